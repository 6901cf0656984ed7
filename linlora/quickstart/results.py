"""From the records of all runs to the numbers of the report. Everything printed or drawn is read from here."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import linlora
from linlora.quickstart.experiment import Experiment
from linlora.quickstart.finetune import Runs
from linlora.quickstart.fuse import Scores
from linlora.quickstart.settings import FAMILIES, Family

METHODS = ("average", "task_arithmetic", "scaling_one")


def collect(experiment: Experiment, runs: Runs, scores: Scores, step_time: dict[str, Any], seeds: int) -> dict:
    """All results as plain JSON values. Accuracies are fractions of the test split unless their key says validation."""
    return {
        "environment": environment(experiment.device),
        "settings": asdict(experiment.settings),
        "seeds": seeds,
        "tasks": [task.name for task in experiment.tasks],
        "upright_test_accuracy": experiment.pretraining["upright_test_accuracy"],
        "pretrained": experiment.accuracies(experiment.backbone, "test"),
        "families": {
            family: family_results(
                [[run.record for run in runs[family, seed]] for seed in range(seeds)],
                [scores[family, seed] for seed in range(seeds)],
            )
            for family in FAMILIES
        },
        "step_time": step_time,
    }


def family_results(records: Sequence[Sequence[dict]], scores: Sequence[dict]) -> dict[str, Any]:
    """One family: `records[seed][task]` of the single-task runs and `scores[seed]` of their fusion.

    The normalised score of a fused adapter is the mean over tasks of its accuracy / that of the single-task adapter.
    """
    single = [[record["test"] for record in of_seed] for of_seed in records]
    results: dict[str, Any] = {
        "single": mean_std([statistics.fmean(of_seed) for of_seed in single]),
        "single_by_task": by_task(single),
        "single_validation": mean_std([statistics.fmean(r["validation"] for r in of_seed) for of_seed in records]),
        "scaling": [score["chosen"] for score in scores],
        "scalings": scores[0]["scalings"],
        "curve_validation": [
            mean_std([statistics.fmean(score["validation"][i]) for score in scores])
            for i in range(len(scores[0]["scalings"]))
        ],
        "cosine": [
            [statistics.fmean(score["cosine"][i][j] for score in scores) for j in range(len(single[0]))]
            for i in range(len(single[0]))
        ],
    }
    for method in METHODS:
        fused = [score["test"][method] for score in scores]
        ratios = [
            statistics.fmean(f / s for f, s in zip(*pair, strict=True)) for pair in zip(fused, single, strict=True)
        ]
        results[method] = {
            "absolute": mean_std([statistics.fmean(of_seed) for of_seed in fused]),
            "normalised": mean_std(ratios),
            "by_task": by_task(fused),
        }
    return results


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, with the values; one seed has no deviation (None)."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "by_seed": list(values)}


def by_task(values: Sequence[Sequence[float]]) -> list[float]:
    """The mean over seeds for each task."""
    return [statistics.fmean(of_task) for of_task in zip(*values, strict=True)]


def paired_difference(results: dict, pair: tuple[Family, Family], key: str, part: str | None = None) -> dict[str, Any]:
    """The first family minus the second, seed by seed: both start from the same adapter and see the same batches."""

    def of(family: Family) -> list[float]:
        entry = results["families"][family][key]
        return (entry if part is None else entry[part])["by_seed"]

    return mean_std([one - other for one, other in zip(*map(of, pair), strict=True)])


def environment(device: str) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "scikit-learn", "numpy")
    return {
        "linlora": linlora.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": device,
        "processor": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "backend": linlora.explain("linearized_lora_linear", device).backend,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
