"""The phase that trains: one adapter for each seed, task and family, each kept as soon as it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

import linlora
from linlora import TaskVector
from linlora.formats.export import TASK_VECTOR_FILE
from linlora.quickstart.experiment import Experiment
from linlora.quickstart.progress import Costs, WorkBar
from linlora.quickstart.settings import FAMILIES, FAMILY_TITLES, Family
from linlora.quickstart.train import accuracy, adapted, of_family, training_steps
from linlora.quickstart.workers import Crew
from linlora.storage.run_directory import is_whole, read_json, staged, write_json

RECORD_FILE = "training.json"
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class FineTuned:
    """A finished run: its record (accuracies, losses, seconds), and whether an earlier call had made it."""

    record: dict[str, Any]
    found: bool


Runs = dict[tuple[Family, int], list[FineTuned]]  # by family and seed, in the order of the tasks


def fine_tune_all(experiment: Experiment, seeds: int, crew: Crew, bar: WorkBar[Costs]) -> Runs:
    """Every run, trained now or by an earlier call. Seed by seed, so that an interrupted table lacks whole seeds."""
    jobs = [(family, task.name, seed) for seed in range(seeds) for task in experiment.tasks for family in FAMILIES]
    missing = [job for job in jobs if not _is_done(experiment, *job)]
    bar.skip(sum(bar.costs.fine_tuning(family) for family, _, _ in set(jobs) - set(missing)))
    bar.now("fine-tuning")
    for family, task, seed in crew(fine_tune, missing):
        bar.advance(bar.costs.fine_tuning(family))
        bar.now(f"trained {FAMILY_TITLES[family]}, {task}, seed {seed}")
    runs: Runs = {(family, seed): [] for family in FAMILIES for seed in range(seeds)}
    for job in jobs:
        family, _, seed = job
        record = read_json(experiment.run_directory(*job) / RECORD_FILE)
        runs[family, seed].append(FineTuned(record, found=job not in missing))
    return runs


def fine_tune(experiment: Experiment, family: Family, task: str, seed: int) -> None:
    """Train one adapter and write it, its task vector and its record to its directory."""
    settings, head, splits = experiment.settings, experiment.heads[task], experiment.splits[task]
    start = time.perf_counter()
    model = adapted(experiment.backbone, settings, seed)
    start_vector = TaskVector.from_model(model)  # for plain LoRA: where training starts from
    of_family(model, family)
    losses = list(training_steps(model, head, splits["train"], settings, settings.learning_rate(family), seed))
    record = {
        "validation": accuracy(model, head, splits["validation"]),
        "test": accuracy(model, head, splits["test"]),
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
        "seconds": time.perf_counter() - start,
    }
    vector = TaskVector.from_model(model, point=start_vector if family == "lora" else None)
    with staged(experiment.run_directory(family, task, seed)) as staging:
        save_adapter(model, vector, staging)
        write_json(staging / RECORD_FILE, record)


def save_adapter(model: PeftModel, vector: TaskVector, directory: Path) -> None:
    """The task vector, and beside it an adapter for stock PEFT where there is one of this function."""
    if vector.scope != "model":
        linlora.export(model, directory)
    vector.save(directory / TASK_VECTOR_FILE)


def adapter_files(family: Family) -> tuple[str, ...]:
    """What `save_adapter` writes. No LoRA adapter has the function of a network linearized at model scope."""
    return (TASK_VECTOR_FILE,) if family == "model" else (*_PEFT_FILES, TASK_VECTOR_FILE)


def load_vectors(experiment: Experiment, family: Family, seed: int) -> list[TaskVector]:
    """The vectors of all tasks, in their order."""
    directories = [experiment.run_directory(family, task.name, seed) for task in experiment.tasks]
    return [TaskVector.load(directory / TASK_VECTOR_FILE) for directory in directories]


def _is_done(experiment: Experiment, family: Family, task: str, seed: int) -> bool:
    return is_whole(experiment.run_directory(family, task, seed), *adapter_files(family), RECORD_FILE)
