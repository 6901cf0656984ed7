"""Judges: the tasks that score the user's vectors, and the fusion methods that fit these vectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from linlora.experiments.controls import ELEMENTWISE, ON_WEIGHTS
from linlora.fusion import fuse
from linlora.training.data import has_test
from linlora.training.folder import Run
from linlora.training.kinds import load_task
from linlora.training.recipe import recipe
from linlora.training.settings import Settings
from linlora.training.suite import Suite
from linlora.vectors.base_models import model_name
from linlora.vectors.points import DifferentPointError
from linlora.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class Judge:
    """A task to score vectors by: its settings, and the run that trained its head, if one did."""

    settings: Settings
    run: Run | None = None


def judges(paths: Sequence[str | Path]) -> list[Judge]:
    """The tasks of some run folders and recipes."""
    found = []
    for path in map(Path, paths):
        if path.suffix in (".yaml", ".yml"):
            found += [Judge(settings) for settings in recipe(path).values()]
            continue
        try:
            run = Run.open(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; runs of linlora train and recipes (--on) have data sets") from error
        found.append(Judge(run.settings, run))
    return found


def refuse_untested(tasks: Iterable[Settings]) -> None:
    """Raise a ValueError for a task without a test split of its own: options are chosen on the validation split."""
    for settings in tasks:
        if not has_test(settings.data):
            raise ValueError(
                f"task '{settings.name}' has no test split, and options are chosen on validation: name one "
                "with --test FILE (data.test in a recipe) and run the training command again, which adds its scores"
            )
        if settings.data.validation == (settings.data.test or "test"):
            raise ValueError(
                f"task '{settings.name}': validation and test are both '{settings.data.validation}'; options are "
                "chosen on validation: set data.validation to a part of train, as 0.1"
            )


def refuse_other_bases(tasks: Sequence[Judge], vectors: Sequence[TaskVector]) -> None:
    """Raise a DifferentPointError for a vector of another base model than a task's, whose shapes may fit."""
    for judge, vector in itertools.product(tasks, vectors):
        named, model = vector.base_model, judge.settings.model
        if named and model_name(named) != model_name(model):
            raise DifferentPointError(
                f"a vector is of the base model '{named}', and task '{judge.settings.name}' of '{model}'; if these are "
                f"the same weights, say so: --base {model}"
            )


def suite_of(tasks: Sequence[Judge], vectors: Sequence[TaskVector], *splits: str) -> Suite:
    """The suite of some judges, for vectors of one space; the labels of the splits it is for are checked first."""
    folders = [judge.run.folder for judge in tasks if judge.run is not None]
    if (again := _twice([folder.resolve() for folder in folders])) is not None:
        raise ValueError(f"{folders[again]} is given twice")
    names = [judge.settings.name for judge in tasks]
    if (again := _twice(names)) is not None:
        raise ValueError(f"two tasks are named '{names[again]}'; name one of them: linlora train ... --set name=NAME")
    refuse_other_bases(tasks, vectors)
    heads = {judge.settings.name: judge.run.head if judge.run is not None else None for judge in tasks}
    loaded = {judge.settings.name: load_task(judge.settings) for judge in tasks}
    for task in loaded.values():
        for split in splits:
            task.check(split)
    like = fuse(vectors, "average") if vectors[0].scope == "weight" else vectors[0]
    return Suite(loaded, like, heads)


def _twice(values: Sequence[Any]) -> int | None:
    """The place of the first value that stood before."""
    return next((i for i, value in enumerate(values) if value in values[:i]), None)


def misfit(method: str, vectors: Sequence[TaskVector], own_tasks: bool) -> str | None:
    """Why a method does not fit vectors of one space, None where it does.

    `own_tasks`: each vector is the run of one task, in the order of these.
    """
    scope = vectors[0].scope
    if method == "lorahub" and find_spec("nevergrad") is None:
        return "needs nevergrad: pip install 'linlora[lorahub]'"
    if method == "regmean" and not own_tasks:
        return "needs to know which task is whose: adapters that are runs, without --on"
    if scope == "weight":
        if method in ELEMENTWISE:
            into = ", for a merged model: linlora merge BASE A B --method ties" if method == "ties" else ""
            return f"picks single values of ΔW, which no adapter holds{into}"
        return "needs vectors of one starting point" if method == "adamerging" else None
    if method == "regmean" and scope == "layer":
        moved = any(name.endswith(".dA") for name in vectors[0].deltas)
        return "takes linearized adapters that start at B0 = 0" if moved else None
    return "acts on ΔW; these vectors share a starting point, and add there" if method in ON_WEIGHTS else None
