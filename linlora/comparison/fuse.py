"""One control and seed: its vectors fused by every method, with options chosen on validation, and scored on test."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import linlora
from linlora.comparison.controls import ELEMENTWISE, Control, Space, cosine_matrix, space
from linlora.comparison.settings import Options
from linlora.comparison.tasks import Tasks
from linlora.fusion import disentanglement, predictor, search
from linlora.vectors.task_vector import TaskVector

_MAP_BATCH = 64  # inputs at a time


def fuse_control(
    control: Control, base: nn.Module, vectors: Sequence[TaskVector], tasks: Tasks, options: Options, seed: int
) -> dict[str, Any]:
    """Plain values: for every method the chosen options, what the search saw, and the test score of every task."""
    spaces = {
        elementwise: space(control, base, vectors, "ties" if elementwise else "average", tasks.trained_modules)
        for elementwise in ({method in ELEMENTWISE for method in options.methods} | {False})
    }
    linear = spaces[False]
    linear.put(0.0 * linear.vectors[0])
    before = {split: tasks.scores(linear.model, split) for split in ("validation", "test")}
    return {
        "before": before["test"],
        "methods": {
            method: _fused(method, spaces[method in ELEMENTWISE], tasks, options, seed) for method in options.methods
        },
        "negation": forgetting(linear, tasks, options, before),
        "cosine": cosine_matrix(control, vectors).tolist(),
    }


def _fused(method: str, at: Space, tasks: Tasks, options: Options, seed: int) -> dict[str, Any]:
    """The best of a method's options on the validation split, then one look at the test split."""

    def score(vector: TaskVector, split: str = "validation") -> list[float]:
        at.put(vector)
        return tasks.scores(at.model, split)

    build = functools.partial(linlora.fuse, at.vectors, method, **_data(method, at, tasks, options))
    choices = options.choices(method, seed)
    chosen, curve = dict(choices[0]), []
    if len(choices) > 1:
        found = search(build, score, choices, progress=False)
        chosen = found.options
        curve = [{"options": point.options, "scores": list(point.scores)} for point in found.curve]
    return {"options": chosen, "validation": curve, "test": score(build(**chosen), "test")}


def _data(method: str, at: Space, tasks: Tasks, options: Options) -> dict[str, Any]:
    """What a method wants to see of the tasks."""
    if method == "lorahub":

        def objective(vector: TaskVector) -> float:
            at.put(vector)
            return tasks.loss(at.model)

        return {"objective": objective, "progress": False}
    if method == "adamerging":
        inputs = tasks.unlabeled(options.adamerging_batch)
        return {"model": at.model, "inputs": inputs, "logits": tasks.logits, "progress": False}
    return {}


def forgetting(
    at: Space, tasks: Tasks, options: Options, before: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Every task forgotten by the negative of its vector: what it scores then on test, and the mean of the others.

    λ is the largest that keeps 95 % of the others' mean score on validation, as published; 0, nothing, if none does.
    """
    results: dict[str, list[float]] = {"scaling": [], "forgotten": [], "others": []}
    for task, vector in enumerate(at.vectors):
        scaling, test = 0.0, list(before["test"])
        for candidate in sorted(options.negation_scalings, reverse=True):
            at.put(linlora.fuse([vector], "negation", scaling=candidate))
            if _others(tasks.scores(at.model, "validation"), task) >= options.negation_keeps * _others(
                before["validation"], task
            ):
                scaling, test = candidate, tasks.scores(at.model, "test")
                break
        results["scaling"].append(scaling)
        results["forgotten"].append(test[task])
        results["others"].append(_others(test, task))
    return results


def _others(scores: Sequence[float], task: int) -> float:
    """The mean score of all tasks but one.

    >>> _others([1.0, 0.2, 0.4], task=0)
    0.30000000000000004
    """
    return statistics.fmean(score for other, score in enumerate(scores) if other != task)


def map_control(
    control: Control, base: nn.Module, vectors: Sequence[TaskVector], tasks: Tasks, options: Options
) -> dict[str, Any]:
    """The disentanglement error of the first two tasks over λ1 × λ2, on validation inputs."""
    at = space(control, base, vectors, "average", tasks.trained_modules)
    inputs = [list(of_task) for of_task in tasks.unlabeled(_MAP_BATCH)[:2]]
    predict = predictor(at.model, inputs, tasks.logits)
    first, second = at.vectors[:2]
    found = disentanglement(first, second, predict, options.map_scalings, progress=False)
    return {"scalings": found.scalings.tolist(), "rates": found.rates.tolist()}
