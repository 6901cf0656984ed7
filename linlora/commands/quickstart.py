"""`linlora quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linlora.commands.errors import user_errors


def quickstart(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the run; an interrupted run continues there.",
            show_default="runs/quickstart, or runs/quickstart-routing",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seeds: Annotated[int, typer.Option(help="How many seeds to average over.", min=1)] = 3,
    workers: Annotated[
        str, typer.Option(help="How many processes, or a Dask cluster that shares the file system: dask://HOST:PORT.")
    ] = "2",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the directory holds and start over.")] = False,
    routing: Annotated[
        bool,
        typer.Option("--routing", help="Instead: train inventories of skills on 24 tasks and adapt to 6 new ones."),
    ] = False,
) -> None:
    """Train, fuse and compare plain and linearized LoRA adapters on packaged tasks (minutes, on a CPU)."""
    with user_errors(interrupted="interrupted; run the same command again to continue"):
        from linlora import quickstart as job
        from linlora.experiments.jobs import workers_of
        from linlora.quickstart import routing as routing_job

        run, folder = (routing_job.run, "quickstart-routing") if routing else (job.run, "quickstart")
        run(out or f"runs/{folder}", device=device, seeds=seeds, fresh=fresh, workers=workers_of(workers))
