"""`linlora quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linlora.commands.errors import user_errors


def quickstart(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the run; an interrupted run continues there.",
            show_default="runs/quickstart, or with -text or -routing",
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
    text: Annotated[
        bool,
        typer.Option("--text", help="Instead: the same on a pre-trained text encoder and data sets of the hub."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Of --text: an encoder, a hub id or folder.", show_default="sentence-transformers/all-MiniLM-L6-v2"
        ),
    ] = None,
    task: Annotated[
        list[Path] | None,
        typer.Option(
            help="Of --text: a folder with files train and test of columns text and label, in place of the hub's data "
            "sets (repeatable)."
        ),
    ] = None,
) -> None:
    """Train, fuse and compare plain and linearized LoRA adapters on packaged tasks (minutes, on a CPU)."""
    with user_errors(interrupted="interrupted; run the same command again to continue"):
        if text and routing:
            raise ValueError("--text and --routing are two experiments; choose one")
        if (model or task) and not text:
            raise ValueError("--model and --task are for --text")

        from linlora import quickstart as job
        from linlora.commands.surroundings import quiet
        from linlora.experiments.jobs import workers_of
        from linlora.quickstart import routing as routing_job
        from linlora.quickstart import text as text_job

        common: dict[str, Any] = {"device": device, "seeds": seeds, "fresh": fresh, "workers": workers_of(workers)}
        with quiet():
            if text:
                text_job.run(out or "runs/quickstart-text", model=model, tasks=task or (), **common)
            else:
                run, folder = (routing_job.run, "quickstart-routing") if routing else (job.run, "quickstart")
                run(out or f"runs/{folder}", **common)
