"""Searches the options of a fusion method on a validation split; shows the progress of whatever takes long."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from linlora.vectors.task_vector import TaskVector

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """One point of a search: the options tried and the score of each task."""

    options: dict[str, Any]
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)


@dataclass(frozen=True)
class Search:
    """The best options found, their mean score, and every point tried, in order."""

    options: dict[str, Any]
    score: float
    curve: tuple[Point, ...]


def search(
    build: Callable[..., TaskVector],
    score: Callable[[TaskVector], float | Sequence[float]],
    options: Iterable[Mapping[str, Any]],
    *,
    progress: bool = True,
    description: str = "searching",
) -> Search:
    """Try the options of a fusion method on a validation split: the best of them, and the whole curve.

    The best has the largest mean score; of equal ones (to 1e-12) the first tried, so put the smallest λ first. A score
    that is NaN is in the curve and never the best. Report the test score of the best alone.

    Args:
        build: the fused vector for one set of options, e.g. `functools.partial(linlora.fuse, vectors, "ties")`; called
            once each, so `vectors` has to be a list.
        score: of a fused vector on the validation split, larger is better: one number, or one for each task. It puts
            the vector into the model: `linlora.apply(model, vector)`.
        options: keyword arguments of `build` to try, e.g. `grid(scaling=[0.1, 0.3, 0.5])`.
        progress: show a bar, where stderr is a terminal.

    Raises ValueError for no options, a score without numbers, or nothing but NaN.

    >>> import functools, linlora, torch
    >>> vector = TaskVector({"q.dB": torch.tensor([1.0, 2.0])}, None, "", {"q": 1.0}, "layer")
    >>> build = functools.partial(linlora.fuse, [vector], "task_arithmetic")
    >>> found = search(build, lambda fused: -(fused - 0.6 * vector).norm(), grid(scaling=[0.3, 0.6, 0.9]))
    >>> found.options, [round(point.mean, 2) for point in found.curve]
    ({'scaling': 0.6}, [-0.67, 0.0, -0.67])
    """
    tried = [dict(choice) for choice in options]
    if not tried:
        raise ValueError("search: no options to try were given")
    curve = []
    for choice in bar(tried, description, progress):
        result = score(build(**choice))
        many = isinstance(result, Sequence) or getattr(result, "ndim", 0) > 0  # or an array of numpy or torch
        scores = tuple(float(s) for s in result) if many else (float(result),)  # type: ignore[union-attr, arg-type]
        if not scores:
            raise ValueError(f"search: the score of {choice} holds no number")
        curve.append(Point(choice, scores))
    valid = [point for point in curve if not math.isnan(point.mean)]
    if not valid:
        raise ValueError(f"search: all {len(curve)} scores are NaN; the vectors or the model diverged")
    top = max(point.mean for point in valid)
    best = next(point for point in valid if point.mean >= top - 1e-12)
    return Search(best.options, best.mean, tuple(curve))


def grid(**options: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the values of some options, the last option varying fastest.

    >>> grid(keep=[0.1, 0.2], scaling=[1.0])
    [{'keep': 0.1, 'scaling': 1.0}, {'keep': 0.2, 'scaling': 1.0}]
    """
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def bar(steps: Sequence[T], description: str, progress: bool = True) -> Iterator[T]:
    """Go through steps behind a progress bar on stderr; nothing is shown in a log file.

    >>> list(bar([1, 2], "counting"))
    [1, 2]
    """
    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        return iter(steps)
    return iter(track(steps, description, console=console))
