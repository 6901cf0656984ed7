"""`linlora compare`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from linlora.commands.errors import user_errors


def compare(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A YAML file of several tasks, as for `linlora train`; the quickstart's tasks if left out."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run continues there.")] = Path(
        "runs/compare"
    ),
    seeds: Annotated[int, typer.Option(help="How many seeds to average over.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="Of the quickstart's tasks: cpu or cuda.")] = "cpu",
    learning_rate: Annotated[
        list[str] | None,
        typer.Option(help="Of a recipe: METHOD=RATE for lora, lora-fa, layer or model (repeatable)."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Fusion method (repeatable); all of them if left out.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="What a search tries: --set ties_keep=[0.1,0.2], --set lorahub_budget=20."),
    ] = None,
    workers: Annotated[
        str, typer.Option(help="How many processes, or a Dask cluster that shares the file system: dask://HOST:PORT.")
    ] = "1",
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the directory holds and start over.")] = False,
) -> None:
    """Compare LoRA added as factors and as ΔW, LoRA-FA, layer and model scope, by every fusion method.

    Options of the methods are searched on validation splits, scores are of test splits, absolute and over the
    single-task adapters'; with cosines, disentanglement maps and pictures.
    """
    with user_errors(interrupted="interrupted; run the same command again to continue"):
        from linlora import experiments, quickstart
        from linlora.experiments.jobs import workers_of
        from linlora.experiments.options import Options, learning_rates

        options, processes = Options.of(method or [], set_ or []), workers_of(workers)
        if recipe is None:
            if learning_rate:
                raise ValueError("--learning-rate is for a recipe; those of the quickstart's tasks are chosen already")
            settings = dataclasses.replace(quickstart.CONTROLS, options=options)
            quickstart.run(out, device, seeds, fresh, settings, workers=processes, job="linlora compare")
        else:
            rates = learning_rates(learning_rate or [])
            experiments.compare_recipe(recipe, out, seeds, fresh, options, rates, workers=processes)
