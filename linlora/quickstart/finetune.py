"""The phase that trains: one adapter for each seed, family and task, each kept as soon as it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

import linlora
from linlora import TaskVector
from linlora.export import TASK_VECTOR_FILE
from linlora.quickstart.artifacts import is_whole, read_json, staged, write_json
from linlora.quickstart.experiment import Experiment
from linlora.quickstart.progress import STEP_COST, WorkBar
from linlora.quickstart.settings import FAMILIES, FAMILY_TITLES, Family
from linlora.quickstart.tasks import Task
from linlora.quickstart.train import accuracy, adapted, of_family, training_steps

RECORD_FILE = "training.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", TASK_VECTOR_FILE)


@dataclass(frozen=True)
class FineTuned:
    """A finished run: what training changed, its record (accuracies, losses, seconds), and whether it was found."""

    vector: TaskVector
    record: dict[str, Any]
    found: bool


Runs = dict[tuple[Family, int], list[FineTuned]]  # by family and seed, in the order of the tasks


def fine_tune_all(experiment: Experiment, seeds: int, bar: WorkBar) -> Runs:
    """Every run, trained now or by an earlier call. Seed by seed, so that an interrupted table lacks whole seeds."""
    runs: Runs = {(family, seed): [] for family in FAMILIES for seed in range(seeds)}
    for seed in range(seeds):
        for task in experiment.tasks:
            for family in FAMILIES:
                bar.now(f"{FAMILY_TITLES[family]}, {task.name}, seed {seed}")
                runs[family, seed].append(_run(experiment, family, task, seed, bar))
    return runs


def _run(experiment: Experiment, family: Family, task: Task, seed: int, bar: WorkBar) -> FineTuned:
    directory = experiment.run_directory(family, task, seed)
    found = is_whole(directory, *ADAPTER_FILES, RECORD_FILE)
    if found:
        bar.skip(run_cost(experiment.settings.steps, experiment.settings.batch))
    else:
        fine_tune(experiment, family, task, seed, bar)
    return FineTuned(TaskVector.load(directory / TASK_VECTOR_FILE), read_json(directory / RECORD_FILE), found)


def run_cost(steps: int, batch: int) -> int:
    return STEP_COST * steps * batch


def fine_tune(experiment: Experiment, family: Family, task: Task, seed: int, bar: WorkBar) -> None:
    """Train one adapter and write it, its task vector and its record to its directory."""
    settings, head, splits = experiment.settings, experiment.heads[task.name], experiment.splits[task.name]
    start = time.perf_counter()
    model = adapted(experiment.backbone, settings, seed)
    start_vector = TaskVector.from_model(model)  # for plain LoRA: where training starts from
    of_family(model, family)
    losses = []
    for loss in training_steps(model, head, splits["train"], settings, settings.learning_rate(family), seed):
        losses.append(loss)
        bar.advance(STEP_COST * settings.batch)
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
    """An adapter directory for stock PEFT, with the task vector beside it."""
    linlora.export(model, directory)
    vector.save(directory / TASK_VECTOR_FILE)
