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
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the directory holds and start over.")] = False,
    routing: Annotated[
        bool,
        typer.Option("--routing", help="Instead: train inventories of skills on 24 tasks and adapt to 6 new ones."),
    ] = False,
) -> None:
    """Train, fuse and compare plain and linearized LoRA adapters on handwritten digits (about three minutes)."""
    from linlora import quickstart as job
    from linlora.quickstart import routing as routing_job

    with user_errors(interrupted="interrupted; run the same command again to continue"):
        if routing:
            routing_job.run(out or "runs/quickstart-routing", device=device, seeds=seeds, fresh=fresh)
        else:
            job.run(out or "runs/quickstart", device=device, seeds=seeds, fresh=fresh)
