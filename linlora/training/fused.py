"""Scores of runs by their own data sets, and of their vectors fused into one: what `linlora eval` does."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from linlora.fusion import METHODS, fuse, grid, search
from linlora.fusion.checks import check_options
from linlora.training.folder import Run
from linlora.training.kinds import load_task
from linlora.training.recipe import recipe
from linlora.training.settings import Settings
from linlora.training.suite import Suite
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector

_SCALINGS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
_FUSED = (0.3, 0.5, 0.7, 0.9, 1.1, 1.5, 2.0)
# What a search tries of a method's options, those aside that are given.
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "task_arithmetic": {"scaling": _SCALINGS},
    "ties": {"keep": (0.1, 0.2, 0.3), "scaling": (0.3, 0.5, 0.8, 1.0, 1.5, 2.0)},
    "dare": {"drop": (0.5, 0.9), "scaling": _SCALINGS},
    "negation": {"scaling": _SCALINGS},
    "tsv": {"scaling": _FUSED},
    "iso_c": {"scaling": _FUSED},
    "iso_cts": {"scaling": _FUSED},
    "knots_ties": {"scaling": _FUSED},
    "wudi_minimiser": {"scaling": _FUSED},
    "compress_then_merge": {"scaling": _FUSED},
}
_PROVIDED = {"lorahub": ("objective",), "adamerging": ("model", "inputs", "logits")}  # by `_data`
_EXAMPLES = 16  # validation rows of each task in LoraHub's objective
_UNLABELED = 16  # validation rows in a batch of AdaMerging, labels not looked at


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


def suite_of(tasks: Sequence[Judge], like: TaskVector, *splits: str) -> Suite:
    """The suite of some judges, at the point of a vector; the labels of the splits it is for are checked first."""
    names = [judge.settings.name for judge in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two tasks are named '{twice[0]}'; give one another `name:` in its settings.yaml or recipe")
    heads = {judge.settings.name: judge.run.head if judge.run is not None else None for judge in tasks}
    loaded = {judge.settings.name: load_task(judge.settings) for judge in tasks}
    for task in loaded.values():
        for split in splits:
            task.check(split)
    return Suite(loaded, like, heads)


def evaluate_vector(vector: TaskVector, tasks: Sequence[Judge], split: str) -> dict[str, Any]:
    """The scores of one vector on a split of some tasks."""
    suite = suite_of(tasks, vector, split)
    return _result(suite, suite.scores(vector, split, progress=True), split)


def evaluate_alone(tasks: Sequence[Judge], split: str) -> dict[str, Any]:
    """The scores of runs, each by its own task. Their models need have nothing in common."""
    results = [evaluate_vector(judge.run.vector, [judge], split) for judge in tasks if judge.run is not None]
    folders = [str(judge.run.folder) for judge in tasks if judge.run is not None]
    scores = {f: s for f, result in zip(folders, results, strict=True) for s in result["tasks"].values()}
    return {**results[0], "tasks": scores, "mean": {"score": statistics.fmean(s["score"] for s in scores.values())}}


def evaluate_fused(
    vectors: Sequence[TaskVector],
    tasks: Sequence[Judge],
    split: str,
    method: str,
    options: Mapping[str, Any],
    searched: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """The scores of fused vectors on a split of some tasks, beside those of the single runs.

    Args:
        options: of the method. With `searched` they are searched on the validation split, among the values of GRIDS, or
            of a list where an option is one; the split itself has no say.
        console: where the search is followed.

    Returns: what `evaluate_vector` does, with "single" and "normalised" scores; the "references", by split what the
        backbone without a vector and the average score; and the "search", every point with its validation scores.

    LoraHub's objective is the loss on 16 validation rows of each task; AdaMerging sees validation rows without labels.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}'; choose one of {', '.join(METHODS)}")
    check_options(method, METHODS[method], {**options, **dict.fromkeys(_PROVIDED.get(method, ()))})
    if any(isinstance(vector, WeightVector) for vector in vectors):
        vectors = [vector.cast("weight") for vector in vectors]
    like = fuse(vectors, "average") if isinstance(vectors[0], WeightVector) else vectors[0]
    suite = suite_of(tasks, like, split, *(["validation"] if searched else []))
    build = functools.partial(fuse, list(vectors), method, **_data(method, suite))
    references = {"backbone": 0.0 * like, "average": fuse(list(vectors), "average")}
    curve = None
    if searched:
        space = {name: values for name, values in GRIDS.get(method, {}).items() if name not in options}
        space |= {name: value if isinstance(value, list) else [value] for name, value in options.items()}
        if not any(len(values) > 1 for values in space.values()):
            raise ValueError(f"search: {method} has no option with several values to try; give one a list of them")
        choices, count = grid(**space), itertools.count(1)

        def score(vector: TaskVector) -> list[float]:
            i = next(count)
            if console is not None and not console.is_terminal:  # which has a bar
                console.print(f"search {i} of {len(choices)}: {in_words(choices[i - 1])}", highlight=False)
            return _scores(suite, vector, "validation")

        found = search(build, score, choices)
        options = found.options
        curve = [{"options": point.options, "scores": list(point.scores)} for point in found.curve]
    vector = build(**options)
    result = _result(suite, suite.scores(vector, split, progress=True), split)
    splits = dict.fromkeys([split, *(["validation"] if searched else [])])
    result["references"] = {
        name: {of: _scores(suite, reference, of) for of in splits} for name, reference in references.items()
    }
    single = {judge.settings.name: _single(judge, split) for judge in tasks}
    return {
        **_normalised(result, single),
        "method": method,
        "options": dict(options),
        "search": curve,
    }


def _scores(suite: Suite, vector: TaskVector, split: str) -> list[float]:
    return [scores["score"] for scores in suite.scores(vector, split).values()]


def in_words(options: Mapping[str, Any]) -> str:
    """Options of a method.

    >>> in_words({"keep": 0.2, "scaling": 1.0})
    'keep 0.2, scaling 1.0'
    """
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _data(method: str, suite: Suite) -> dict[str, Any]:
    """What a method wants to see of the tasks."""
    if method == "lorahub":
        return {"objective": lambda vector: suite.loss(vector, "validation", _EXAMPLES)}
    if method == "adamerging":
        inputs = suite.unlabeled("validation", _UNLABELED)
        return {"model": suite.model, "inputs": inputs, "logits": suite.logits}
    return {}


def _single(judge: Judge, split: str) -> float | None:
    """What the run of a task scores by itself."""
    if judge.run is None:
        return None
    if split in judge.run.metrics:
        return float(judge.run.metrics[split]["score"])
    return evaluate_vector(judge.run.vector, [judge], split)["mean"]["score"]


def _result(suite: Suite, scores: Mapping[str, Mapping[str, float]], split: str) -> dict[str, Any]:
    tasks = {name: {"metric": suite.tasks[name].metric, **of_task} for name, of_task in scores.items()}
    mean = {"score": statistics.fmean(of_task["score"] for of_task in scores.values())}
    return {"split": split, "method": None, "options": {}, "tasks": tasks, "mean": mean, "search": None}


def _normalised(result: dict[str, Any], single: Mapping[str, float | None]) -> dict[str, Any]:
    """The result with each run's own score and fused / single; None where there is no run, or it scores 0."""
    tasks, ratios = {}, []
    for name, of_task in result["tasks"].items():
        alone = single[name]
        ratios.append(of_task["score"] / alone if alone else None)
        tasks[name] = {**of_task, "single": alone, "normalised": ratios[-1]}
    mean = {**result["mean"], "single": _mean(single.values()), "normalised": _mean(ratios)}
    return {**result, "tasks": tasks, "mean": mean}


def _mean(values: Any) -> float | None:
    """The mean; None if a value is missing."""
    values = list(values)
    return None if any(value is None for value in values) else statistics.fmean(values)
