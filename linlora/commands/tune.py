"""`linlora tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linlora.commands.errors import user_errors

if TYPE_CHECKING:
    import torch

    from linlora.ops.evidence import Call


def tune(
    model: Annotated[
        str | None, typer.Option(help="Measure the linear layers of this transformers model instead of a grid.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Rows of a batch, with --model.", min=1)] = 4096,
    rank: Annotated[list[int] | None, typer.Option(help="Ranks; 16 and 64 if not given. Repeatable.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seconds: Annotated[float | None, typer.Option(help="About how long; until all is measured if not given.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Also write all that this machine has measured to a file.")
    ] = None,
    call: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Prove the kernels on this machine's GPU: check each against float64, time it, and use the fastest from then on.

    What is measured is kept under `$XDG_CACHE_HOME/linlora/evidence`; the same command measures what is left. A kernel
    is chosen where it was correct and faster than composed torch. `linlora info`, `linlora.explain` cite the figures.
    """
    with user_errors(interrupted="interrupted; what was measured is kept, the same command measures the rest"):
        from linlora.bench import tuning
        from linlora.ops.evidence import Call

        device = tuning.this_gpu()
        if dtype not in ("bfloat16", "float16", "float32"):
            raise typer.BadParameter(f"{dtype!r}: choose bfloat16, float16 or float32", param_hint="--dtype")
        if call is not None:
            asked = json.loads(call)
            calls = [Call(**asked | {"size": tuple(asked["size"])})]
        elif model is not None:
            calls = tuning.calls_of_layers(model, tokens, rank or [16], dtype)
        else:
            calls = tuning.grid(rank or [16, 64], dtype)
        _measure(calls, device, seconds, fresh)
        if export is not None:
            typer.echo(f"Saved {export}: {tuning.export(export, device)} entries")


def _measure(calls: list[Call], device: torch.device, seconds: float | None, fresh: bool) -> None:
    """Measure under a bar, and print what is known of the calls, of all or of those before an interruption."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from linlora.bench import tuning
    from linlora.bench.tables import wide_console
    from linlora.bench.tune_report import tuning_table

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = wide_console()
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(f"{calls[0]}", total=len(calls))
            following = iter([*calls[1:], calls[-1]])

            def after(done: Call) -> None:
                progress.update(bar, advance=1, description=str(next(following)))

            left = tuning.measure_all(calls, device, seconds, after, fresh).left
        if left:
            typer.echo(f"{left} of {len(calls)} calls are left; the same command measures them")
    finally:
        console.print(tuning_table(tuning.entries_of(calls, device)))
        console.print(f"Kept in {tuning.place(device)}", highlight=False, soft_wrap=True)
