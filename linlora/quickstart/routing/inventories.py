"""The first phase: inventories of skills, trained on batches of mixed tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linlora.experiments.descent import descend
from linlora.quickstart.routing.workplace import Rows, Workplace, accuracy
from linlora.routing import RoutedModel, route
from linlora.storage.run_directory import read_json, staged, write_json

TRAINING_FILE = "training.json"
INVENTORY_FILE = "routed_model.safetensors"
_ENCODER = ["q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "dense", "fc1", "fc2"]  # by any release


def train_inventory(place: Workplace, inventory: str, seed: int) -> None:
    """Train one inventory, skills and logits together, and write it with its record."""
    start = time.perf_counter()
    model = new_inventory(place, inventory, seed)
    losses = [loss.item() for loss in training_steps(place, model, seed)]
    seconds = time.perf_counter() - start
    model.eval()
    validation = []
    for task, pair in enumerate(place.trained):
        rows = place.rows(pair, "validation")
        validation.append(accuracy(model, rows, task_ids=torch.full((len(rows),), task)))
    with staged(place.inventory_folder(inventory, seed)) as staging:
        model.save_pretrained(staging)
        parameters = model.report().trainable
        record = {"validation": validation, "first_loss": losses[0], "last_loss": losses[-1], "seconds": seconds}
        write_json(staging / TRAINING_FILE, {**record, "parameters": sum(parameters.values())})


def new_inventory(place: Workplace, inventory: str, seed: int) -> RoutedModel:
    """An untrained inventory on every linear layer of the backbone: one shared skill, Poly (Q = 1) or MHR."""
    settings = place.settings
    kinds: dict[str, dict[str, Any]] = {
        "shared": {"variant": "shared"},
        "poly": {"variant": "poly", "n_skills": settings.skills},
        "mhr": {"variant": "poly", "n_skills": settings.skills, "n_heads": settings.heads},
    }
    reader = place.reader()  # reading one draws
    torch.manual_seed(seed)
    return route(
        reader, len(place.trained), rank=settings.rank, alpha=settings.alpha,
        target_modules=_ENCODER, **kinds[inventory],
    )  # fmt: skip


def load_inventory(place: Workplace, inventory: str, seed: int) -> RoutedModel:
    directory = place.inventory_folder(inventory, seed)
    return RoutedModel.from_pretrained(place.reader(), directory).to(place.device).eval()


def training_record(place: Workplace, inventory: str, seed: int) -> dict:
    return read_json(place.inventory_folder(inventory, seed) / TRAINING_FILE)


def training_steps(place: Workplace, model: RoutedModel, seed: int) -> Iterator[Tensor]:
    """AdamW on mixed batches, the tasks drawn evenly; yields the loss of each step. Rates fall to zero."""
    settings = place.settings
    every = [place.rows(pair, "train") for pair in place.trained]
    rows = Rows(*(torch.cat([getattr(r, part) for r in every]) for part in ("images", "question_ids", "labels")))
    tasks = torch.arange(len(every)).repeat_interleave(len(every[0]))
    groups = [
        {"params": list(model.skills()), "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": list(model.selectors.parameters()), "lr": settings.logits_learning_rate, "weight_decay": 0.0},
    ]
    generator = torch.Generator().manual_seed(seed)
    indices = (torch.randint(len(rows), (settings.batch,), generator=generator) for _ in range(settings.steps))

    def loss(index: Tensor) -> Tensor:
        batch = rows[index]
        return model(
            pixel_values=batch.images, question_ids=batch.question_ids, labels=batch.labels, task_ids=tasks[index]
        ).loss

    model.train()
    return descend([group for group in groups if group["params"]], settings.steps, indices, loss)
