"""`linlora quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linlora.commands.errors import user_errors


def quickstart(
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run continues there.")] = Path(
        "runs/quickstart"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    seeds: Annotated[int, typer.Option(help="How many seeds to average over.", min=1)] = 3,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the directory holds and start over.")] = False,
) -> None:
    """Train, fuse and compare plain and linearized LoRA adapters on handwritten digits (about four minutes)."""
    from linlora import quickstart as job

    with user_errors(interrupted="interrupted; run the same command again to continue"):
        job.run(out, device=device, seeds=seeds, fresh=fresh)
