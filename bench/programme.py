"""The performance programme: every shape and rank of the layers, on every backend and every kernel by itself.

    python -m linlora.bench.programme --device cuda --seconds 540 --out bench/results/h200

It takes longer than one sitting: the same command continues where the last one stopped. Whatever has been measured so
far it prints (`programme_report`) and draws (`heatmaps`): time over `F.linear`, % of cuBLAS and of the roofline, what
small M costs on device and host, the table of backends that follows, and which goals are met.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, Dtype, Filters, Ranks, chosen_cases, chosen_device

if TYPE_CHECKING:
    from .results import Run  # torch takes a second to import

_SAME = ("gpu", "cpu", "torch", "triton", "linlora", "commit", "threads")
"""What has to be the same for a run to be continued."""


def resume(file: Path, suite: str, device: Any) -> Run:
    """The run that `file` holds, to be continued, or a new one. Raises ValueError where it is of another machine,
    commit or suite."""
    from .results import Run
    from .runner import new_run

    fresh = new_run(suite, device)
    if not file.exists():
        return fresh
    made = Run.load(file)
    there, here = made.environment | {"suite": made.suite}, fresh.environment | {"suite": suite}
    changed = [
        f"{name} {there.get(name)} → {here.get(name)}"
        for name in (*_SAME, "suite")
        if there.get(name) != here.get(name)
    ]
    if changed:
        raise ValueError(
            f"{file} is of another run ({'; '.join(changed)}): name another folder with --out, or start over with "
            "--fresh"
        )
    made.not_run.clear()
    return made


def programme(
    out: Annotated[Path, typer.Option(help="Folder of programme.json and the pictures.")] = Path("runs/programme"),
    device: Device = "auto",
    suite: Annotated[
        str, typer.Option(help="'programme', or a suite of `linlora bench` to try it with.")
    ] = "programme",
    dtype: Dtype = None,
    rank: Ranks = None,
    case: Filters = None,
    seconds: Annotated[float, typer.Option(help="Wall-clock time of this sitting.", min=1)] = 540,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the folder holds.")] = False,
) -> None:
    """Measure every backend and kernel at every shape and rank; continue, print and draw what there is.

    The exit status is 1 when a result is wrong: it has no time then.
    """
    from . import heatmaps, programme_report, runner
    from .providers import EAGER, VARIANTS
    from .tables import wide_console

    place = chosen_device(device)
    wanted = chosen_cases(suite, dtype or ("bfloat16" if place.type == "cuda" else None), rank, case)
    wanted = [c for c in wanted if c.kind == "layer"]
    file = out / "programme.json"
    if fresh:
        file.unlink(missing_ok=True)
    try:
        made = resume(file, suite, place)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None
    measured = {result.case for result in made.results}
    left = [c for c in wanted if c not in measured]
    providers = [*(p for p in EAGER if p.backend or p.function == "frozen"), *VARIANTS]
    try:
        runner.run(suite, left, providers, place, seconds, lambda run: run.save(file), made)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command continues {file}")
        raise typer.Exit(130) from None
    console = wide_console()
    programme_report.print_programme(made, console)
    for picture in heatmaps.draw(made, out, "programme"):
        console.print(f"Saved {picture}", highlight=False, soft_wrap=True)
    console.print(f"Saved {file}: {len(made.results)} of {len(wanted)} cases.", highlight=False, soft_wrap=True)
    if made.not_run:
        console.print("The same command measures the rest.", highlight=False)
    if any(True for _ in made.red):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(programme)
