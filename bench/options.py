"""Options that commands of the benchmark share, and what they stand for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import suites
from .cases import Case

Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; bfloat16 on a GPU if not given.")]
Ranks = Annotated[list[int] | None, typer.Option("--rank", help="Replace the ranks of the suite. Repeatable.")]
Filters = Annotated[list[str] | None, typer.Option("--case", help="Keep cases whose id holds this. Repeatable.")]
Suite = Annotated[str | None, typer.Option(help=f"One of {', '.join(suites.SUITES)}; 'gpu' on a GPU if not given.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]


def chosen_cases(suite: str, dtype: str | None, ranks: list[int] | None, filters: list[str] | None) -> list[Case]:
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r}: choose float32, bfloat16 or float16", param_hint="--dtype")
    try:
        every = suites.suite(suite)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--suite") from None
    chosen = suites.select(every, dtype, ranks or (), filters or ())
    if not chosen:
        raise typer.BadParameter(
            f"no case of suite {suite!r} holds {filters}; `linlora bench list --suite {suite}` shows them",
            param_hint="--case",
        )
    return chosen


def chosen_device(name: str) -> Any:
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is not a device: use cpu, cuda or cuda:1", param_hint="--device") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r}: the benchmark runs on cpu and cuda", param_hint="--device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA GPU is available to this torch; use --device cpu", param_hint="--device")
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
