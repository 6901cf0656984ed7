"""Collects the files of all jobs into the numbers of the report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from linlora.experiments.experiment import MAP_FILE, SCORES_FILE, Experiment
from linlora.experiments.options import START_TITLES
from linlora.storage.run_directory import read_json


def collect(experiment: Experiment, seeds: int) -> dict[str, Any]:
    """The results of every start and control. Scores are fractions of the test split unless a key says validation."""
    found: dict[str, Any] = {}
    for start, note in experiment.starts.items():
        controls = {}
        for control in experiment.controls_of(start):
            records = [
                [experiment.record(start, control.trained, task, seed) for task in experiment.names]
                for seed in range(seeds)
            ]
            scores = [read_json(experiment.fused_folder(start, control, s) / SCORES_FILE) for s in range(seeds)]
            controls[control.key] = control_results(records, scores)
            map_file = experiment.map_folder(start, control) / MAP_FILE
            controls[control.key]["map"] = read_json(map_file) if map_file.exists() else None
        found[start] = {"title": START_TITLES[start], "note": note, "controls": controls}
    return {"seeds": seeds, "tasks": list(experiment.names), "starts": found}


def control_results(
    records: Sequence[Sequence[Mapping[str, Any]]], scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One control: `records[seed][task]`, what its adapters score by themselves, and `scores[seed]` of `fuse_control`.

    The normalised score is the mean over tasks of fused / single, of each seed; None where a single score is 0.
    """
    first = scores[0]
    single = [[record["test"] for record in of_seed] for of_seed in records]
    return {
        "before": mean_std([statistics.fmean(score["before"]) for score in scores]),
        "single": mean_std([statistics.fmean(of_seed) for of_seed in single]),
        "single_validation": spread_of([mean_if_all([r.get("validation") for r in of_seed]) for of_seed in records]),
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
        "normalised": spread_of([normalised(*pair) for pair in zip(fused, single, strict=True)]),
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
    """The normalised scores of one control minus those of another, seed by seed; None where a method fits one alone."""
    found = [start["controls"][key]["methods"].get(method) for key in (one, other)]
    if None in found:
        return spread_of([None])
    pairs = zip(*(of["normalised"]["by_seed"] for of in found), strict=True)
    return spread_of([None if None in pair else pair[0] - pair[1] for pair in pairs])


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, with the values; one seed has no deviation (None)."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "by_seed": list(values)}


def spread_of(values: Sequence[float | None]) -> dict[str, Any]:
    """`mean_std`; None where a value is missing."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return {"mean": None, "std": None, "by_seed": list(values)}
    return mean_std(numbers)


def mean_if_all(values: Iterable[float | None]) -> float | None:
    """The mean; None if a value is missing."""
    every = list(values)
    there = [value for value in every if value is not None]
    return statistics.fmean(there) if len(there) == len(every) else None
