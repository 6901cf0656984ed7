"""`linlora compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linlora.commands.errors import user_errors


def compare(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="A recipe of several tasks, as for `linlora train`; or adapters to fuse, mixed: folders of runs, task "
            "vectors, PEFT adapters, ids of the hub. The packaged tasks if left out."
        ),
    ] = None,
    on: Annotated[
        list[Path] | None,
        typer.Option(help="Of adapters: score by the data of this run or recipe (repeatable), not of their own runs."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Of adapters: the base model of all, where they name it differently.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the run; an interrupted run continues there.")] = Path(
        "runs/compare"
    ),
    seeds: Annotated[
        int | None, typer.Option(help="Not of adapters: how many seeds to average over.", min=1, show_default="3")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Of the packaged tasks: cpu or cuda.", show_default="cpu")] = None,
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
    """Which fusion method, which λ? Every method that fits, options searched on validation, scores of test splits.

    linlora compare RUN RUN RUN: your own adapters, on the tasks of their runs; prints the command that makes the best.

    linlora compare A B --on recipe.yaml: anyone's adapters, on the tasks of a recipe.

    linlora compare recipe.yaml: trains LoRA, layer and model scope on its tasks, and adds them in every way; with
    cosines, disentanglement maps and pictures.
    """
    with user_errors(interrupted="interrupted; run the same command again to continue"):
        import dataclasses

        from linlora import experiments, quickstart
        from linlora.commands.surroundings import quiet
        from linlora.experiments.jobs import workers_of
        from linlora.experiments.options import described, learning_rates
        from linlora.training.recipe import assigned

        given = {"methods": method, "seeds": seeds, "learning_rates": learning_rates(learning_rate or [])}
        section = dict(assigned(set_ or [])) | {key: value for key, value in given.items() if value}
        processes = workers_of(workers)
        recipe = paths[0] if paths and len(paths) == 1 and Path(paths[0]).suffix in (".yaml", ".yml") else None
        if device and paths:
            raise ValueError("--device is of the packaged tasks; in a recipe it is training.use_cpu")
        if (on or base) and (recipe or not paths):
            raise ValueError("--on and --base are of adapters; name adapters")
        with quiet():
            if recipe is not None:
                experiments.compare_recipe(recipe, out, fresh, {"experiment": section}, workers=processes)
                return
            seed_count, options, rates = described(section, "--set")
            if rates:
                raise ValueError("--learning-rate is for a recipe")
            if paths and "seeds" in section:
                raise ValueError("--seeds is not of adapters, which are trained already")
            if paths:
                experiments.compare_adapters(paths, on or (), out, fresh, options, workers=processes, base=base)
            else:
                settings = dataclasses.replace(quickstart.CONTROLS, options=options)
                quickstart.run(
                    out, device or "cpu", seed_count, fresh, settings, workers=processes, job="linlora compare"
                )
