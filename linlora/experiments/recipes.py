"""Comparisons on the tasks of a recipe: any model and data sets that `linlora train` takes.

Every task is trained by LoRA, at layer and at model scope, and with A frozen where the recipe's point has B0 != 0 (at
B0 = 0 that is layer scope), in folders as `linlora train` fills them. Where the recipe leaves open where the linearized
function ends (`linear_to`), model scope is tried both ways.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from linlora.experiments.comparison import Comparison
from linlora.experiments.controls import START_NOTES, Start, Trained
from linlora.experiments.jobs import Workers
from linlora.experiments.judges import refuse_untested
from linlora.experiments.options import Options, described
from linlora.experiments.run import run
from linlora.experiments.stamps import stamps
from linlora.formats.vector_folder import TASK_VECTOR_FILE
from linlora.storage.run_directory import read_json
from linlora.training import Run, Settings, Task, load_task, read_recipe, train
from linlora.training.adapted import read_point
from linlora.training.folder import METRICS_FILE
from linlora.training.settings import FAMILIES
from linlora.training.similarity import Similarity
from linlora.training.suite import TaskSet, different_models


def compare_recipe(
    path: str | Path | None,
    out: str | Path = "runs/compare",
    fresh: bool = False,
    overrides: Mapping[str, Any] | None = None,
    console: Console | None = None,
    workers: Workers = 1,
) -> dict[str, Any]:
    """Compare every control by every fusion method on the tasks of a recipe; print and draw the report.

    A call with the same `out` continues where an interrupted one was.

    Args:
        path: the YAML file; at least two tasks that share one model. A `method` in it has no say here. None takes the
            overrides alone. In the section `experiment` may stand `seeds` (3), `learning_rates` by method ("lora",
            "lora-fa", "layer", "model") where they are not the tasks', `methods`, and every field of `Options`. Seeds
            are counted from the recipe's on.
        overrides: settings that go before those of the file: {"experiment": {"seeds": 1}}.
        workers: how many adapters are trained at a time; each has the model in memory.

    Raises what `linlora.training.train` does; ValueError for tasks that do not share one model, fewer than two of them,
    or in a process group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("compare runs in one process; train the tasks with torchrun and linlora train, then fuse them")
    found = read_recipe(path, (), overrides)
    seeds, options, rates = described(found.experiment, f"{found.where}, experiment")
    _check(found.tasks, rates)
    experiment = RecipeExperiment(found.tasks, Path(out), options, rates)
    for task in experiment.loaded.values():  # of all tasks before the first one trains
        for split in task.splits:
            task.check(split)
    return run(experiment, "linlora compare", seeds, workers, fresh, console)


class RecipeExperiment(Comparison):
    """The comparison of a recipe in a run directory; a task is loaded when a process first asks for it."""

    def __init__(
        self, settings: Mapping[str, Settings], out: Path, options: Options, rates: Mapping[str, float]
    ) -> None:
        self.settings, self.out, self.options, self.rates = dict(settings), out, options, dict(rates)
        self.names, first = tuple(settings), next(iter(settings.values()))
        self.device, self.starts = first.device, _starts(first)
        is_similarity = isinstance(next(iter(self.loaded.values())), Similarity)
        if is_similarity and not any(s.linear_to for s in settings.values()):
            self.controls = (*self.controls, "features")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("loaded", "to_features")}

    @functools.cached_property
    def loaded(self) -> dict[str, Task]:
        return {name: load_task(settings) for name, settings in self.settings.items()}

    @functools.cached_property
    def to_features(self) -> dict[str, Task]:
        return {name: load_task(settings.changed(linear_to="features")) for name, settings in self.settings.items()}

    def loaded_for(self, trained: Trained) -> dict[str, Task]:
        return self.to_features if trained == "features" else self.loaded

    def fingerprint(self) -> dict[str, Any]:
        return {
            "tasks": {name: {**s.to_dict(), "out": "", "method": ""} for name, s in self.settings.items()},
            "files": stamps(*self.settings.values()),
            "options": asdict(self.options),
            "learning_rates": self.rates,
        }

    def base(self, trained: Trained) -> nn.Module:
        return next(iter(self.loaded_for(trained).values())).base_model().to(self.device).requires_grad_(False)

    def tasks(self, start: Start, trained: Trained, seed: int) -> TaskSet:
        runs = [Run.open(self.adapter_folder(start, trained, name, seed)) for name in self.names]
        heads = {name: run.head for name, run in zip(self.names, runs, strict=True)}
        return TaskSet(self.loaded_for(trained), heads, self.trained_modules)

    @functools.cached_property
    def trained_modules(self) -> list[str]:
        return next(iter(self.loaded.values())).trained_modules(self.base("lora"))

    def train(self, start: Start, trained: Trained, task: str, seed: int) -> None:
        settings, method = self.settings[task], "model" if trained == "features" else trained
        rates = {"learning_rate": self.rates[method]} if method in self.rates else {}
        end = "features" if trained == "features" else settings.linear_to
        out = str(self.adapter_folder(start, trained, task, seed))
        train(settings.changed(method=method, linear_to=end, seed=settings.seed + seed, out=out, training=rates))

    def adapter_files(self, trained: Trained) -> tuple[str, ...]:
        return (TASK_VECTOR_FILE, METRICS_FILE)

    def record(self, start: Start, trained: Trained, task: str, seed: int) -> dict[str, float | None]:
        metrics = read_json(self.adapter_folder(start, trained, task, seed) / METRICS_FILE)
        return {split: metrics[split]["score"] if split in metrics else None for split in ("validation", "test")}


def _starts(settings: Settings) -> dict[Start, str]:
    point = read_point(settings)
    if point is not None and any(B0.any() for name, B0 in (point.point or {}).items() if name.endswith(".B0")):
        return {"warm": "The adapters start from the recipe's point."}
    return {"zero": START_NOTES["zero"]}


def _check(tasks: Mapping[str, Settings], learning_rates: Mapping[str, float]) -> None:
    if len(tasks) < 2:
        raise ValueError(f"a comparison fuses two tasks or more, the recipe has {len(tasks)}")
    for method in learning_rates:
        if method not in FAMILIES:
            raise ValueError(f"learning rate of '{method}': the methods are {', '.join(FAMILIES)}")
    first, *others = tasks.values()
    for other in others:
        if odd := different_models(first, other, "point", "seed"):
            raise ValueError(f"tasks '{first.name}' and '{other.name}' do not share one model: {'; '.join(odd)}")
    refuse_untested(tasks.values())
