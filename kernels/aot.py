"""Compiles every configuration of the table ahead of time and checks what came out; needs no GPU.

    python -m linlora.kernels.aot                                  every architecture, a readable table
    python -m linlora.kernels.aot --arch 90 --op lora_linear --json report.json --jobs 2

Each case builds the launch that the host function would, from tensors on the meta device, and lets Triton compile it
for the architecture. The cubin must use no local memory (register spills), ask for no more shared memory than the
architecture has, and use its tensor cores where the dtype has any. Compiled is not run: this says nothing about
results or speed. Exits with 1 when a case fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import configs
from .configs import Config, Row
from .factor_gradients import launch as launch_factor_gradients
from .launch import Launch
from .linearized_lora_linear import launch as launch_recompute
from .linearized_lora_linear_flags import launch as launch_flags
from .lora_linear import launch as launch_lora_linear

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory a program may use. 80 also stands for sm_86, sm_89 and sm_120, the smallest of which counts.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
M, N, K = 8192, 4096, 4096


@dataclass(frozen=True)
class Case:
    """One compilation: a row of the table on an architecture, in one variant of the op."""

    architecture: int
    row: Row
    rank: int
    dtype: str
    variant: str  # words of: pair, short, adjoint, dropout, fp32-factors, untangled

    def __str__(self) -> str:
        c = self.row.config
        tile = f"{c.block_m}x{c.block_n}x{c.block_k}x{c.block_r} w{c.num_warps} s{c.num_stages}"
        return (
            f"sm_{self.architecture:<3} {self.row.op:22} {c.design:9} {self.row.shape:6} r={self.rank:<3} "
            f"{tile:22} {self.dtype:8} {self.variant}"
        )


@dataclass(frozen=True)
class Result:
    """What the cubin of a case holds."""

    case: str
    registers: int
    local_bytes: int
    shared_bytes: int
    tensor_core: dict[str, int]
    failures: tuple[str, ...]


def cases(architecture: int, op: str | None = None) -> Iterator[Case]:
    """Every row in the variants that decide: the one with the most registers, the backward's strides, other dtypes.

    A row is compiled at its rank and, where that takes more than one block of ranks, at a single full block, which
    is a kernel without the loop over blocks. These ranks stand for all smaller ones, the pair form for the short one
    (less of everything) except on the rows of large shapes, and bf16 for fp16 except there.
    """
    for row in configs.TABLE:
        if architecture not in row.architectures or op not in (None, row.op):
            continue
        dtype = "bfloat16" if row.itemsize == 2 else "float32"
        dropout = " dropout" if row.dropout else ""
        if row.op == "factor_gradients":
            yield Case(architecture, row, row.rank, dtype, "pair dropout")
            continue
        one_block = min(row.rank, row.config.block_r)
        ranks = {row.rank} if _is_served(one_block, row, architecture) else {one_block, row.rank}
        for rank in sorted(ranks):
            yield Case(architecture, row, rank, dtype, "pair fp32-factors" + dropout)
            yield Case(architecture, row, rank, dtype, "pair adjoint" + dropout)
        if row.shape == "large":
            yield Case(architecture, row, min(ranks), "float16", "short")
            if row.op == "lora_linear":
                yield Case(architecture, row, min(ranks), dtype, "pair adjoint untangled" + dropout)


def _is_served(rank: int, by: Row, architecture: int) -> bool:
    """Whether `by` is never asked for this rank: its kernel knows no single block, or a row above it comes first."""
    above = configs.TABLE[: configs.TABLE.index(by)]
    return by.config.design != "recompute" or any(
        (row.op, row.shape, row.itemsize, row.config.design) == (by.op, by.shape, by.itemsize, by.config.design)
        and architecture in row.architectures
        and rank <= row.rank
        and row.dropout >= by.dropout
        for row in above
    )


def build(case: Case) -> Launch:
    """The launch of the case, from tensors on the meta device."""
    config, variant, dtype = case.row.config, case.variant.split(), getattr(torch, case.dtype)
    rank = case.rank
    dropout_p = 0.1 if "dropout" in variant else 0.0
    seed = _meta(torch.int64)
    if case.row.op == "factor_gradients":
        p, g, x = _meta(dtype, M, rank), _meta(dtype, M, N), _meta(dtype, M, K)
        d_expand, d_shrink = _meta(torch.float32, N, rank), _meta(torch.float32, rank, K)
        return launch_factor_gradients(p, g, p, x, 2.0, dropout_p, seed, d_expand, d_shrink, config)

    adjoint, pair = "adjoint" in variant, "pair" in variant
    factor_dtype = torch.float32 if "fp32-factors" in variant else dtype

    def weight_like(of: torch.dtype, rows: int, columns: int) -> Tensor:
        return _meta(of, columns, rows).t() if adjoint else _meta(of, rows, columns)

    x, y, u = _meta(dtype, M, K), _meta(dtype, M, N), _meta(dtype, M, rank)
    weight = weight_like(dtype, N, K)
    bias = None if adjoint else _meta(dtype, N)
    shrink, expand = weight_like(factor_dtype, rank, K), weight_like(factor_dtype, N, rank)
    layer = (weight, bias, shrink, shrink if pair else None, expand if pair else None, expand, 2.0, dropout_p, seed)
    c = u if pair else _meta(dtype, M, 0)
    if case.row.op == "linearized_lora_linear":
        launch = launch_flags if config.design == "flags" else launch_recompute
        return launch(x, *layer, adjoint, y, u, c, config)
    untangled = "untangled" in variant  # the backward of a layer whose input had no tangent: no y
    return launch_lora_linear(x, x, *layer, adjoint, None if untangled else y, y, u, c, config)


def check(case: Case) -> Result:
    """Compiles the case and reads its cubin."""
    triton.runtime.driver.set_active(_CompileOnly(case.architecture))
    try:
        kernel = build(case).compile()
    except Exception as error:
        return Result(str(case), 0, 0, 0, {}, (f"does not compile: {type(error).__name__}: {error}",))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {case}")
    registers, stack, _, local = map(int, usage.groups())
    counts = {name: len(re.findall(rf"\b{name}\b", text)) for name in TENSOR_CORE}
    shared, limit = kernel.metadata.shared, SHARED_LIMIT[case.architecture]
    expected = _tensor_core_of(case.architecture, case.row.config, case.row.itemsize)
    failures = []
    if stack + local > 0:
        failures.append(f"spills: {stack} B of stack, {local} B of local memory")
    if shared > limit:
        failures.append(f"{shared} B of shared memory, sm_{case.architecture} has {limit}")
    if expected is not None and counts[expected] == 0:
        failures.append(f"no {expected} in the machine code")
    found = {name: count for name, count in counts.items() if count}
    return Result(str(case), registers, stack + local, shared, found, tuple(failures))


def _tensor_core_of(architecture: int, config: Config, itemsize: int) -> str | None:
    """The instruction a 16-bit dot must become; wgmma and tcgen05 take 64 rows or more. fp32 asks for none."""
    if itemsize == 4:
        return None
    rows = config.block_n if config.design == "split" else config.block_m
    if rows < 64 or architecture == 80:
        return "HMMA"
    return {90: "HGMMA", 100: "UTCHMMA"}[architecture]


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _CompileOnly:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m linlora.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="default: all of them")
    parser.add_argument("--op", choices=sorted({row.op for row in configs.TABLE}), help="default: all of them")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default 1)")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    todo = [case for architecture in options.arch or ARCHITECTURES for case in cases(architecture, options.op)]
    results = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        print(f"{'case':108} registers  spills  shared   tensor-core instructions")
        for result in map(check, todo) if options.jobs == 1 else pool.map(check, todo):  # a pool starts on first use
            results.append(result)
            cores = " ".join(f"{name} {count}" for name, count in result.tensor_core.items())
            print(f"{result.case:108} {result.registers:9} {result.local_bytes:7} {result.shared_bytes:7}   {cores}")
            for failure in result.failures:
                print(f"    FAILED: {failure}")
            sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    failed = sum(bool(result.failures) for result in results)
    print(f"{len(results)} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
