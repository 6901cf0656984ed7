"""From the files of all jobs to the numbers of the report. Everything printed or drawn is read from here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from linlora.quickstart.results import mean_std


def control_results(single: Sequence[Sequence[float]], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One control: `single[seed][task]`, what its adapters score by themselves, and `scores[seed]` of `fuse_control`.

    The normalised score is the mean over tasks of fused / single, of each seed; None where a single score is 0.
    """
    first = scores[0]
    return {
        "before": mean_std([statistics.fmean(score["before"]) for score in scores]),
        "single": mean_std([statistics.fmean(of_seed) for of_seed in single]),
        "single_by_seed_and_task": [list(of_seed) for of_seed in single],
        "methods": {
            method: _method_results(single, [score["methods"][method] for score in scores])
            for method in first["methods"]
        },
        "negation": {
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
        "normalised": _spread([normalised(*pair) for pair in zip(fused, single, strict=True)]),
        "by_seed_and_task": fused,
        "options_by_seed": [of_seed["options"] for of_seed in found],
        "validation": [
            {"options": points[0]["options"], **mean_std([statistics.fmean(point["scores"]) for point in points])}
            for points in zip(*(of_seed["validation"] for of_seed in found), strict=True)
        ],
    }


def normalised(fused: Sequence[float], single: Sequence[float]) -> float | None:
    """The mean over tasks of fused / single; None where a single adapter scores 0.

    >>> normalised([0.4, 0.9], [0.8, 0.9])
    0.75
    """
    return statistics.fmean(f / s for f, s in zip(fused, single, strict=True)) if all(single) else None


def paired(start: Mapping[str, Any], one: str, other: str, method: str) -> dict[str, Any]:
    """The normalised scores of one control minus those of another, seed by seed."""
    of = {key: start["controls"][key]["methods"][method]["normalised"]["by_seed"] for key in (one, other)}
    return _spread([None if None in pair else pair[0] - pair[1] for pair in zip(of[one], of[other], strict=True)])


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and deviation; None where a value is missing."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return {"mean": None, "std": None, "by_seed": list(values)}
    return mean_std(numbers)
