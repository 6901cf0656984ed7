"""`linlora bench`: run the benchmark, list its cases, plot a run."""

from __future__ import annotations

import warnings
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from .options import Device, Dtype, Filters, Ranks, Suite, chosen_cases, chosen_device


class _RunByDefault(TyperGroup):
    """`linlora bench --suite quick` is `linlora bench run --suite quick`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="bench",
    cls=_RunByDefault,
    help="Measure linlora against torch.func, PEFT and the frozen layer. Alone it is 'run': the default suite.",
)


@app.command()
def run(
    suite: Suite = None,
    device: Device = "auto",
    dtype: Dtype = None,
    rank: Ranks = None,
    case: Filters = None,
    provider: Annotated[list[str] | None, typer.Option(help="Only this provider and the floor. Repeatable.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Providers under torch.compile as well.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the JSON file.")] = Path("runs/bench"),
    seconds: Annotated[float, typer.Option(help="Wall-clock time of the whole run; cases share it.", min=1)] = 160,
) -> None:
    """Check, time and weigh every provider on every case of a suite; print a table, save one JSON.

    The exit status is 1 when a result is wrong: it has no time then.
    """
    from .providers import providers  # torch and transformers take seconds to import
    from .report import print_run
    from .runner import run as run_cases
    from .tables import wide_console

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    place = chosen_device(device)
    suite = suite or ("gpu" if place.type == "cuda" else "default")
    chosen = chosen_cases(suite, dtype or ("bfloat16" if place.type == "cuda" else None), rank, case)
    try:
        measured = providers(tuple(provider or ()), compiled)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--provider") from None
    file = _new_file(out, suite)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task(chosen[0].layer, total=len(chosen))

        def after_case(made: Any) -> None:
            made.save(file)
            done = len(made.results) + len(made.not_run)
            progress.update(bar, completed=done, description=chosen[min(done, len(chosen) - 1)].layer)

        try:
            made = run_cases(suite, chosen, measured, place, seconds, after_case)
        except KeyboardInterrupt:
            progress.stop()
            kept = f"{file} has the cases measured before" if file.exists() else "no case was measured yet"
            typer.echo(f"interrupted; {kept}", err=True)
            raise typer.Exit(130) from None
    console = wide_console()
    print_run(made, console)
    console.print(f"\nSaved {file}. Plot it: linlora bench plot {file}", highlight=False, soft_wrap=True)
    if any(True for _ in made.red):
        raise typer.Exit(1)


@app.command("list")
def list_cases(suite: Suite = "default", dtype: Dtype = None, rank: Ranks = None, case: Filters = None) -> None:
    """List the cases of a suite, one id a line."""
    for chosen in chosen_cases(suite or "default", dtype, rank, case):
        typer.echo(chosen.id)


@app.command("forward-mode")
def forward_mode(
    size: Annotated[str, typer.Option(help="tiny, dit-s or dit-b.")] = "dit-s",
    device: Device = "auto",
    seconds: Annotated[float, typer.Option(help="Wall-clock time of the measurement.", min=1)] = 60,
) -> None:
    """Measure a MeanFlow step of a diffusion transformer by `functional.dual` against the ways of PyTorch."""
    from .forward_mode import SIZES, measure, table

    if size not in SIZES:
        raise typer.BadParameter(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    typer.echo(table(measure(size, chosen_device(device), seconds)))


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="A JSON file of `linlora bench`.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the pictures; beside the file if not given.")] = None,
) -> None:
    """Draw time over the floor for every case, and over the rank, as PNG files."""
    from .plot import plot_run
    from .results import Run

    try:
        made = Run.load(file)
        for picture in plot_run(made, out or file.parent, file.stem):
            typer.echo(f"Saved {picture}")
    except FileNotFoundError:
        raise typer.BadParameter(f"{file} does not exist", param_hint="FILE") from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="FILE") from None


def _new_file(folder: Path, suite: str) -> Path:
    """A file that does not exist yet, named by suite and time."""
    stem = f"{suite}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = [folder / f"{stem}.json", *(folder / f"{stem}-{i}.json" for i in range(2, 100))]
    return next(file for file in candidates if not file.exists())
