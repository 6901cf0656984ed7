"""What runs under compute-sanitizer: every kernel of Triton, and of csrc/ where it is built, at shapes that reach every
design.

    compute-sanitizer --tool memcheck  python -m linlora.bench.sanitize
    compute-sanitizer --tool racecheck python -m linlora.bench.sanitize

The shapes are as small as each design allows, for a sanitizer slows a kernel down a hundredfold. The wide ones give
every multiprocessor a tile, forward or backward: that is where the persistent kernel with flags runs. Every case is
launched several times, because the flags are handed from launch to launch.
Results are compared with the float64 reference, as everywhere. racecheck sees hazards in shared memory; that the flags
in global memory order the programs is checked by the results, which are wrong or missing when they do not.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from . import gate
from .cases import Case, Form, Op, StreamOp, attention_case, routing_case, stream_case
from .data import random_data
from .providers import PROVIDERS, Provider

_LAUNCHES = 3
_STREAM_OPS: tuple[StreamOp, ...] = ("linear", "layer_norm", "rms_norm", "activation", "gated_activation")


def cases(multiprocessors: int) -> list[Case]:
    """Ragged and aligned, few rows and many, both forms, all ops, both kinds of dtype."""
    wide = 256 * -(-multiprocessors // 16)  # with 2048 rows, a 128 × 256 tile for every multiprocessor
    shapes = ((1, 64, 64), (5, 1024, 64), (37, 72, 136), (300, 256, 512), (2048, 128, wide), (2048, wide, 128))
    forms: tuple[tuple[Op, Form], ...] = (
        ("linearized_lora_linear", "short"),
        ("linearized_lora_linear", "pair"),
        ("lora_linear", "pair"),
    )
    layers = [
        Case("sanitize", "sanitize", M, K, N, rank=rank, dtype=dtype, form=form, op=op, bias=True)
        for M, K, N in shapes
        for op, form in forms
        for rank, dtype in ((16, "bfloat16"), (8, "float32"))
        if not (dtype == "float32" and M > 300)
    ]
    streams = [
        *(
            stream_case("sanitize", op, op, M, K, N)
            for op in _STREAM_OPS
            for M, K, N in ((37, 72, 136), (300, 256, 512))
        ),
        *(attention_case("sanitize", 2, 2, length, size, length > 64) for length, size in ((37, 40), (300, 128))),
    ]
    routed = [
        replace(
            routing_case("tiny", "linear", batch, length, tasks, tasks_in), model="sanitize", K=K, N=N, heads=heads
        )
        for batch, length, tasks, tasks_in, K, N, heads in (
            (37, 1, 5, "skewed", 72, 136, 8), (12, 25, 3, "uniform", 256, 512, 1), (64, 32, 8, "uniform", 128, 2048, 4)
        )
    ]  # fmt: skip
    return [*layers, *(replace(case, dtype=dtype) for case in (*streams, *routed) for dtype in ("bfloat16", "float32"))]


def main() -> int:
    """Run every case on every backend with kernels. The number of wrong results; 1 where nothing runs."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    red, ran, obstacles = 0, 0, set()
    for provider in (PROVIDERS["linlora-triton"], PROVIDERS["linlora-cuda"]):
        for case in filter(provider.serves, cases(multiprocessors)):
            if (obstacle := provider.obstacle(case, device)) is not None:
                obstacles.add(f"{provider.label} does not run: {obstacle}")
            else:
                red, ran = red + (_problem(case, provider, device) is not None), ran + 1
    print(*sorted(obstacles), f"{ran} cases, {red} wrong", sep="\n")
    return red if ran else 1


def _problem(case: Case, provider: Provider, device: torch.device) -> str | None:
    """What is wrong with a case; printed, too."""
    data = random_data(case, device)
    job = provider.job(case, device, data)
    expected = gate.expected(case, provider.function, data, device)
    problem = None
    for _ in range(_LAUNCHES):
        problem = problem or gate.verdict(case, gate.errors(job.results(), expected))
    print(f"{provider.label}: {case.id}: {problem or 'green'}", flush=True)
    return problem


if __name__ == "__main__":
    sys.exit(main())
