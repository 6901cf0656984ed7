"""The numbers of the report, of the scores by seed and task."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def control_results(
    records: Sequence[Sequence[Mapping[str, Any]]], scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One control: `records[seed][task]`, what its adapters score by themselves, and `scores[seed]` of `fuse_control`.

    The normalised score is the mean over tasks of fused / single, of each seed; None where a single score is 0 or less.
    """
    first = scores[0]
    single = [[record["test"] for record in of_seed] for of_seed in records]
    return {
        "before": mean_std([statistics.fmean(score["before"]) for score in scores]),
        "single": mean_std([statistics.fmean(of_seed) for of_seed in single]),
        "single_validation": mean_std([mean_if_all([r.get("validation") for r in of_seed]) for of_seed in records]),
        "single_by_seed_and_task": single,
        "methods": {
            method: _method_results(single, [score["methods"][method] for score in scores])
            for method in first["methods"]
        },
        "negation": first["negation"]
        and {
            "scaling_by_seed_and_task": [score["negation"]["scaling"] for score in scores],
            **{
                part: mean_std([statistics.fmean(score["negation"][part]) for score in scores])
                for part in ("forgotten", "others")
            },
        },
        "cosine": [
            [statistics.fmean(score["cosine"][i][j] for score in scores) for j in range(len(first["cosine"]))]
            for i in range(len(first["cosine"]))
        ],
    }


def _method_results(single: Sequence[Sequence[float]], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    fused = [of_seed["test"] for of_seed in found]
    return {
        "absolute": mean_std([statistics.fmean(of_seed) for of_seed in fused]),
        "normalised": mean_std([normalised(*pair) for pair in zip(fused, single, strict=True)]),
        "by_seed_and_task": fused,
        "options_by_seed": [of_seed["options"] for of_seed in found],
        "validation": [
            {"options": points[0]["options"], **mean_std([statistics.fmean(point["scores"]) for point in points])}
            for points in zip(*(of_seed["validation"] for of_seed in found), strict=True)
        ],
    }


def ratio(fused: float, single: float | None) -> float | None:
    """Fused / single; None where there is no single score, or none above 0."""
    return fused / single if single is not None and single > 0 else None


def normalised(fused: Sequence[float], single: Sequence[float]) -> float | None:
    """The mean over tasks of fused / single; None where a single adapter scores 0 or less.

    >>> normalised([0.4, 0.9], [0.8, 0.9])
    0.75
    """
    return mean_if_all(map(ratio, fused, single))


def paired(start: Mapping[str, Any], one: str, other: str, method: str) -> dict[str, Any]:
    """The normalised scores of one control minus those of another, seed by seed; None where a method fits one alone."""
    found = [start["controls"][key]["methods"].get(method) for key in (one, other)]
    if None in found:
        return mean_std([None])
    pairs = zip(*(of["normalised"]["by_seed"] for of in found), strict=True)
    return mean_std([None if None in pair else pair[0] - pair[1] for pair in pairs])


def mean_std(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, with the values; None where one is missing, or too few."""
    there = [value for value in values if value is not None]
    several = len(there) == len(values) > 1
    return {"mean": mean_if_all(values), "std": statistics.stdev(there) if several else None, "by_seed": list(values)}


def mean_if_all(values: Iterable[float | None]) -> float | None:
    """The mean; None if a value is missing."""
    every = list(values)
    there = [value for value in every if value is not None]
    return statistics.fmean(there) if len(there) == len(every) else None
