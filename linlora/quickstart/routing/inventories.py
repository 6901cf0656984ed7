"""The first phase: inventories of skills, trained on batches of mixed tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linlora.quickstart.routing.experiment import RoutingExperiment, Rows, accuracy
from linlora.routing import RoutedModel, route
from linlora.storage.run_directory import read_json, staged, write_json

TRAINING_FILE = "training.json"
INVENTORY_FILE = "routed_model.safetensors"
_ENCODER = ["q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "dense", "fc1", "fc2"]  # by any release


def train_inventory(experiment: RoutingExperiment, inventory: str, seed: int) -> None:
    """Train one inventory, skills and logits together, and write it with its record."""
    start = time.perf_counter()
    model = new_inventory(experiment, inventory, seed)
    losses = [loss.item() for loss in training_steps(experiment, model, seed)]
    seconds = time.perf_counter() - start
    model.eval()
    validation = []
    for task, pair in enumerate(experiment.trained):
        rows = experiment.rows(pair, "validation")
        validation.append(accuracy(model, rows, task_ids=torch.full((len(rows),), task)))
    with staged(experiment.inventory_folder(inventory, seed)) as staging:
        model.save_pretrained(staging)
        parameters = model.report().trainable
        record = {"validation": validation, "first_loss": losses[0], "last_loss": losses[-1], "seconds": seconds}
        write_json(staging / TRAINING_FILE, {**record, "parameters": sum(parameters.values())})


def new_inventory(experiment: RoutingExperiment, inventory: str, seed: int) -> RoutedModel:
    """An untrained inventory on every linear layer of the backbone: one shared skill, Poly (Q = 1) or MHR."""
    settings = experiment.settings
    kinds: dict[str, dict[str, Any]] = {
        "shared": {"variant": "shared"},
        "poly": {"variant": "poly", "n_skills": settings.skills},
        "mhr": {"variant": "poly", "n_skills": settings.skills, "n_heads": settings.heads},
    }
    reader = experiment.reader()  # reading one draws
    torch.manual_seed(seed)
    return route(
        reader, len(experiment.trained), rank=settings.rank, alpha=settings.alpha,
        target_modules=_ENCODER, **kinds[inventory],
    )  # fmt: skip


def load_inventory(experiment: RoutingExperiment, inventory: str, seed: int) -> RoutedModel:
    directory = experiment.inventory_folder(inventory, seed)
    return RoutedModel.from_pretrained(experiment.reader(), directory).to(experiment.device).eval()


def training_record(experiment: RoutingExperiment, inventory: str, seed: int) -> dict:
    return read_json(experiment.inventory_folder(inventory, seed) / TRAINING_FILE)


def training_steps(experiment: RoutingExperiment, model: RoutedModel, seed: int) -> Iterator[Tensor]:
    """AdamW on mixed batches, the tasks drawn evenly; yields the loss of each step. Rates fall to zero."""
    settings = experiment.settings
    every = [experiment.rows(pair, "train") for pair in experiment.trained]
    rows = Rows(*(torch.cat([getattr(r, part) for r in every]) for part in ("images", "question_ids", "labels")))
    tasks = torch.arange(len(every)).repeat_interleave(len(every[0]))
    groups = [
        {"params": list(model.skills()), "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": list(model.selectors.parameters()), "lr": settings.logits_learning_rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(settings.steps):
        index = torch.randint(len(rows), (settings.batch,), generator=generator)
        batch = rows[index]
        loss = model(
            pixel_values=batch.images, question_ids=batch.question_ids, labels=batch.labels, task_ids=tasks[index]
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()
