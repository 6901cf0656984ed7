"""The phase that fuses: the vectors of one family and seed into one, by average and by task arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import linlora
from linlora import TaskVector
from linlora.quickstart.artifacts import is_whole, read_json, staged, write_json
from linlora.quickstart.experiment import Experiment
from linlora.quickstart.finetune import ADAPTER_FILES, FineTuned, Runs, save_adapter
from linlora.quickstart.progress import WorkBar
from linlora.quickstart.settings import FAMILY_TITLES, Family, Settings
from linlora.quickstart.train import adapted, of_family

SCORES_FILE = "scores.json"
FUSED = ("average", "task_arithmetic")
_FILES = (SCORES_FILE, *(f"{method}/{file}" for method in FUSED for file in ADAPTER_FILES))

Scores = dict[tuple[Family, int], dict[str, Any]]


def fuse_all(experiment: Experiment, runs: Runs, bar: WorkBar) -> Scores:
    """The scores of every family and seed: found, or fused now if one of their adapters was trained now."""
    scores: Scores = {}
    for (family, seed), fine_tuned in runs.items():
        bar.now(f"fusing {FAMILY_TITLES[family]}, seed {seed}")
        directory = experiment.fused_directory(family, seed)
        if is_whole(directory, *_FILES) and all(run.found for run in fine_tuned):
            bar.skip(fusion_cost(experiment.settings, len(experiment.tasks), *_split_sizes(experiment)))
        else:
            fuse_one(experiment, family, seed, fine_tuned, bar)
        scores[family, seed] = read_json(directory / SCORES_FILE)
    return scores


def fusion_cost(settings: Settings, tasks: int, validation: int, test: int) -> int:
    """Images through the network: the validation split for each scaling of the grid, the test split for three."""
    return tasks * (len(settings.scalings) * validation + 3 * test)


def _split_sizes(experiment: Experiment) -> tuple[int, int]:
    splits = experiment.splits[experiment.tasks[0].name]  # every task has the same images in its splits
    return len(splits["validation"]), len(splits["test"])


def fuse_one(experiment: Experiment, family: Family, seed: int, fine_tuned: Sequence[FineTuned], bar: WorkBar) -> None:
    """Choose the scaling on the validation split, then look at the test split: once each for average, λ and λ = 1."""
    vectors = [run.vector for run in fine_tuned]
    scalings = experiment.settings.scalings
    model = of_family(adapted(experiment.backbone, experiment.settings, seed), family)
    validation_cost, test_cost = (len(experiment.tasks) * size for size in _split_sizes(experiment))

    validation = []
    for scaling in scalings:
        linlora.apply(model, linlora.fuse(vectors, "task_arithmetic", scaling=scaling))
        validation.append(experiment.accuracies(model, "validation"))
        bar.advance(validation_cost)
    chosen = choose_scaling(scalings, validation)

    fused = {
        "average": linlora.fuse(vectors, "average"),
        "task_arithmetic": linlora.fuse(vectors, "task_arithmetic", scaling=chosen),
        "scaling_one": linlora.fuse(vectors, "task_arithmetic", scaling=1.0),
    }
    test = {}
    with staged(experiment.fused_directory(family, seed)) as staging:
        for method, vector in fused.items():
            linlora.apply(model, vector)
            test[method] = experiment.accuracies(model, "test")
            if method in FUSED:
                save_adapter(model, vector, staging / method)
            bar.advance(test_cost)
        scores = {"scalings": scalings, "validation": validation, "chosen": chosen, "test": test}
        write_json(staging / SCORES_FILE, {**scores, "cosine": cosine_matrix(vectors)})


def choose_scaling(scalings: Sequence[float], validation: Sequence[Sequence[float]]) -> float:
    """The scaling with the best mean validation accuracy over the tasks; of equal ones, the smallest.

    Args:
        scalings: the grid.
        validation: for each scaling, the validation accuracy of each task.

    >>> choose_scaling([0.0, 0.5, 1.0], [[0.2, 0.2], [0.9, 0.5], [0.8, 0.6]])
    0.5
    """
    means = [statistics.fmean(accuracies) for accuracies in validation]
    best = max(means)
    return min(scaling for scaling, mean in zip(scalings, means, strict=True) if mean >= best - 1e-12)


def cosine_matrix(vectors: Sequence[TaskVector]) -> list[list[float]]:
    return [[one.cosine(other) for other in vectors] for one in vectors]
