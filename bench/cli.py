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

from . import suites
from .cases import Case
from .programme import programme


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

_Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; bfloat16 on a GPU if not given.")]
_Ranks = Annotated[list[int] | None, typer.Option("--rank", help="Replace the ranks of the suite. Repeatable.")]
_Filters = Annotated[list[str] | None, typer.Option("--case", help="Keep cases whose id holds this. Repeatable.")]
_Suite = Annotated[str | None, typer.Option(help=f"One of {', '.join(suites.SUITES)}; 'gpu' on a GPU if not given.")]


@app.command()
def run(
    suite: _Suite = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")] = "auto",
    dtype: _Dtype = None,
    rank: _Ranks = None,
    case: _Filters = None,
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
def list_cases(suite: _Suite = "default", dtype: _Dtype = None, rank: _Ranks = None, case: _Filters = None) -> None:
    """List the cases of a suite, one id a line."""
    for chosen in chosen_cases(suite or "default", dtype, rank, case):
        typer.echo(chosen.id)


app.command()(programme)


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


def _new_file(folder: Path, suite: str) -> Path:
    """A file that does not exist yet, named by suite and time."""
    stem = f"{suite}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = [folder / f"{stem}.json", *(folder / f"{stem}-{i}.json" for i in range(2, 100))]
    return next(file for file in candidates if not file.exists())


def wide_console() -> Console:
    """Standard output; 120 columns wide where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
