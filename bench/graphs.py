"""CUDA graphs: a training step of a linearized model, captured once and replayed, trains exactly as the step itself.

    python -m linlora.bench.graphs

A capture fails on anything that a replay could not repeat: a synchronization, memory of the host that is read at the
time of a launch, state that the host keeps between launches. The models are stacks of LoRA layers, at the shapes that
reach every kernel of a backend.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import linlora
from linlora.ops import backends

SHAPES = ((8, 64), (48, 128), (512, 256), (4096, 512))
"""Rows and features."""
_STEPS = 4


def check(backend: str, rows: int, features: int, scope: str, dropout: float = 0.0) -> str | None:
    """Train by replays and by steps, from the same start on the same batches. None when every loss and every trained
    factor is equal to the last bit, else what differs. Needs a GPU."""
    with linlora.use_backend(backend):  # type: ignore[arg-type]
        replayed = train(rows, features, scope, dropout, torch.device("cuda"), captured=True)
        stepped = train(rows, features, scope, dropout, torch.device("cuda"), captured=False)
    for name, tensor in stepped.items():
        if not torch.equal(tensor, replayed[name]):
            return f"{name} differs: {(tensor - replayed[name]).abs().max().item():.1e}"
    return None


def train(
    rows: int, features: int, scope: str, dropout: float, device: torch.device, captured: bool
) -> dict[str, Tensor]:
    """The losses of a few steps, and the trained factors after them."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(features, features) for _ in range(3)))
    config = LoraConfig(r=8, target_modules=["0", "1", "2"], lora_dropout=dropout)
    model = get_peft_model(base.to(device, torch.bfloat16), config, autocast_adapter_dtype=False)
    linlora.linearize(model, scope)  # type: ignore[arg-type]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # In both runs: without it, AdamW rounds elsewhere.
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, capturable=device.type == "cuda")
    batches = torch.randn(_STEPS, rows, features, device=device, dtype=torch.bfloat16)
    batch = batches[0].clone()
    loss = torch.zeros((), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        found = model(batch).float().square().mean()
        found.backward()
        optimizer.step()
        loss.copy_(found.detach())

    run = _capture(step, parameters, optimizer) if captured else step
    if not captured:
        _rehearse(step, parameters, optimizer)
    losses = []
    for rows_of_step in batches:
        batch.copy_(rows_of_step)
        run()
        losses.append(loss.clone())
    return {"loss": torch.stack(losses), **{f"parameter {i}": p.detach().clone() for i, p in enumerate(parameters)}}


def _rehearse(step: Callable[[], None], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One step that allocates gradients and moments and compiles kernels, and is then undone."""
    start = [parameter.detach().clone() for parameter in parameters]
    step()
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
        for state in optimizer.state.values():
            for moment in state.values():
                moment.zero_()


def _capture(
    step: Callable[[], None], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _rehearse(step, parameters, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main() -> int:
    """Check every backend that runs here, at every shape and scope; the number of differences is the exit status."""
    if not torch.cuda.is_available():
        print("cannot run: CUDA graphs need a GPU")
        return 1
    wrong = 0
    for backend in ("torch", "triton", "cuda"):
        if (obstacle := backends.unavailable(backend, torch.device("cuda"))) is not None:
            print(f"{backend}: not checked: {obstacle}")
            continue
        for rows, features in SHAPES:
            for scope in ("layer", "model"):
                problem = check(backend, rows, features, scope)
                wrong += problem is not None
                print(f"{backend} {rows}×{features} {scope} scope: {problem or 'equal'}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
