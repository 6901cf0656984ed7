"""One control and seed: its vectors fused by every method, with options chosen on validation, and scored on test."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import linlora
from linlora.experiments.controls import Control, Space, cosine_matrix, kind_of_space, space
from linlora.experiments.options import SEEDED, Options, fusion_method, in_words
from linlora.experiments.tasks import Tasks
from linlora.fusion import disentanglement, predictor, search
from linlora.fusion.regmean import input_moments
from linlora.vectors.task_vector import TaskVector

_BATCH = 64  # inputs at a time, of maps and moments


@dataclass(frozen=True)
class Fusion:
    """The scores of one control, as plain values, and the fused vector of each method."""

    scores: dict[str, Any]
    vectors: dict[str, TaskVector]


def fuse_control(
    control: Control, base: nn.Module, vectors: Sequence[TaskVector], tasks: Tasks, options: Options, seed: int
) -> Fusion:
    """For every method that fits: the chosen options, the scores the search saw, and the test score of every task."""
    methods = [method for method in options.methods if control.fits(method)]
    spaces: dict[str, Space] = {}
    for method in ("average", *methods):
        if (kind := kind_of_space(control, method)) not in spaces:
            spaces[kind] = space(control, base, vectors, fusion_method(method), tasks.trained_modules)
    linear = spaces[kind_of_space(control, "average")]
    linear.put(0.0 * linear.vectors[0])
    before = {"test": tasks.scores(linear.model, "test")}
    if options.negation_scalings:
        before["validation"] = tasks.scores(linear.model, "validation")
    found, fused = {}, {}
    for method in methods:
        at = spaces[kind_of_space(control, method)]
        found[method], fused[method] = fuse_by(method, at, tasks, options, seed)
    scores = {
        "before": before["test"],
        "methods": found,
        "negation": forgetting(linear, tasks, options, before) if options.negation_scalings else None,
        "cosine": cosine_matrix(control, vectors).tolist(),
    }
    return Fusion(scores, fused)


def fuse_by(method: str, at: Space, tasks: Tasks, options: Options, seed: int) -> tuple[dict[str, Any], TaskVector]:
    """The best of a method's options on the validation split, then one look at the test split; and the fused vector."""
    build = builder(fusion_method(method), at, tasks, options)
    choices = options.choices(method, {"seed": [seed]} if method in SEEDED else {})
    chosen, curve = (dict(choices[0]), []) if len(choices) == 1 else best_options(build, at, tasks, choices)
    fused = build(**chosen)
    at.put(fused)
    return {"options": chosen, "validation": curve, "test": tasks.scores(at.model, "test")}, fused


def best_options(
    build: Callable[..., TaskVector],
    at: Space,
    tasks: Tasks,
    choices: Sequence[Mapping[str, Any]],
    console: Console | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best of some options on the validation split, and the scores of all; shown on a console if there is one."""
    count = itertools.count(1)

    def score(vector: TaskVector) -> list[float]:
        at.put(vector)
        i = next(count)
        if console is not None and not console.is_terminal:  # which has a bar
            console.print(f"search {i} of {len(choices)}: {in_words(choices[i - 1])}", highlight=False)
        return tasks.scores(at.model, "validation")

    found = search(build, score, choices, progress=console is not None)
    return found.options, [{"options": point.options, "scores": list(point.scores)} for point in found.curve]


def builder(
    method: str, at: Space, tasks: Tasks, options: Options, progress: bool = False
) -> Callable[..., TaskVector]:
    """`linlora.fuse` of the vectors of a space by a method, with what it sees of the tasks: validation rows.

    They are without labels for AdaMerging and RegMean, with labels for LoraHub and LoRA-Soups.
    """
    seen = data_for(method, at, tasks, options)
    if method in ("lorahub", "adamerging", "soup"):
        seen["progress"] = progress
    return functools.partial(linlora.fuse, list(at.vectors), method, **seen)


def data_for(method: str, at: Space, tasks: Tasks, options: Options) -> dict[str, Any]:
    """The part of the tasks that a method sees."""
    if method == "lorahub":
        few = list(_in_turns(tasks.labeled(options.lorahub_examples, options.lorahub_examples)))

        @torch.no_grad()
        def objective(vector: TaskVector) -> float:
            at.put(vector)
            return statistics.fmean(float(tasks.loss(at.model, batch)) for batch in few)

        return {"objective": objective}
    if method == "adamerging":
        inputs = tasks.unlabeled(options.adamerging_batch)
        return {"model": at.model, "inputs": inputs, "logits": tasks.logits}
    if method == "regmean":
        return {"inputs": [_moments(at, i, tasks, options) for i in range(len(at.vectors))]}
    if method == "soup":
        rows = tasks.labeled(options.adamerging_batch, options.soup_examples)
        return {"model": at.base(), "batches": list(_in_turns(rows)), "loss": tasks.loss}
    return {}


def _moments(at: Space, task: int, tasks: Tasks, options: Options) -> dict[str, Tensor]:
    """E x xᵀ of the layers' inputs where the adapter of a task sees that task."""
    at.put(at.vectors[task])
    layers = dict.fromkeys(layer for vector in at.vectors for layer in vector.scalings)
    batches = tasks.unlabeled(_BATCH, limit=options.regmean_examples)[task]
    return input_moments(at.model, batches, layers, logits=tasks.logits)


def _in_turns(tasks: Sequence[Iterable[Any]]) -> Iterator[Any]:
    """The first batch of each task, then the second of each."""
    for of_all in itertools.zip_longest(*tasks):
        yield from (batch for batch in of_all if batch is not None)


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
    inputs = [list(of_task) for of_task in tasks.unlabeled(_BATCH)[:2]]
    predict = predictor(at.model, inputs, tasks.logits)
    first, second = at.vectors[:2]
    found = disentanglement(first, second, predict, options.map_scalings, progress=False)
    return {"scalings": found.scalings.tolist(), "rates": found.rates.tolist()}
