"""The phase that fuses: the vectors of one family and seed into one, by average and by task arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import linlora
from linlora import TaskVector
from linlora.quickstart.experiment import Experiment
from linlora.quickstart.finetune import Runs, adapter_files, load_vectors, save_adapter
from linlora.quickstart.progress import Costs, WorkBar
from linlora.quickstart.settings import FAMILY_TITLES, Family
from linlora.quickstart.train import adapted, of_family
from linlora.quickstart.workers import Crew
from linlora.storage.run_directory import is_whole, read_json, staged, write_json

SCORES_FILE = "scores.json"
FUSED = ("average", "task_arithmetic")

Scores = dict[tuple[Family, int], dict[str, Any]]


def fuse_all(experiment: Experiment, runs: Runs, crew: Crew, bar: WorkBar[Costs]) -> Scores:
    """The scores of every family and seed: found, or fused now if one of their adapters was trained now."""
    found = [job for job, of_job in runs.items() if _is_done(experiment, *job) and all(run.found for run in of_job)]
    bar.skip(sum(bar.costs.fusion(family) for family, _ in found))
    bar.now("fusing")
    # the longest first, so that no process is left alone with one in the end
    missing = sorted(runs.keys() - set(found), key=lambda job: (-bar.costs.fusion(job[0]), job))
    for family, seed in crew(fuse_one, missing):
        bar.advance(bar.costs.fusion(family))
        bar.now(f"fused {FAMILY_TITLES[family]}, seed {seed}")
    return {job: read_json(experiment.fused_directory(*job) / SCORES_FILE) for job in runs}


def _is_done(experiment: Experiment, family: Family, seed: int) -> bool:
    fused = [f"{method}/{file}" for method in FUSED for file in adapter_files(family)]
    return is_whole(experiment.fused_directory(family, seed), SCORES_FILE, *fused)


def fuse_one(experiment: Experiment, family: Family, seed: int) -> None:
    """Choose the scaling on the validation split, then look at the test split: once each for average, λ and λ = 1."""
    vectors = load_vectors(experiment, family, seed)
    scalings = experiment.settings.scalings
    model = of_family(adapted(experiment.backbone, experiment.settings, seed), family)

    validation = []
    for scaling in scalings:
        linlora.apply(model, linlora.fuse(vectors, "task_arithmetic", scaling=scaling))
        validation.append(experiment.accuracies(model, "validation"))
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
