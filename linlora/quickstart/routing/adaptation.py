"""The second phase: the held-out tasks, each adapted to from a few labelled images by every method."""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import linlora
from linlora.experiments.descent import batches, descend
from linlora.quickstart.routing.inventories import load_inventory
from linlora.quickstart.routing.methods import ADAPTATIONS, Method
from linlora.quickstart.routing.settings import RoutingSettings
from linlora.quickstart.routing.workplace import Rows, Workplace, accuracy
from linlora.routing import RoutedModel, add_task, collapse, fit_routing, mhr_mu, mhr_z
from linlora.storage.run_directory import read_json, staged, write_json

RECORD_FILE = "scores.json"


def adaptation_record(place: Workplace, method: str, shots: int, seed: int) -> dict:
    return read_json(place.adaptation_folder(method, shots, seed) / RECORD_FILE)


def adapt_all(place: Workplace, method: str, shots: int, seed: int) -> None:
    """Adapt to every held-out task by one method and write the accuracies, parameters and seconds."""
    records: list[dict[str, Any]] = []
    for pair in place.held_out:
        train = place.rows(pair, "train")
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:shots]
        torch.manual_seed(seed)
        start = time.perf_counter()
        model, task, parameters = adapt(place, ADAPTATIONS[method], train[chosen], seed)
        seconds = time.perf_counter() - start
        scores = {}
        for split in ("validation", "test"):
            rows = place.rows(pair, split)
            scores[split] = accuracy(model, rows, **_routing(task, rows))
        records.append({"task": str(pair), "seconds": seconds, "parameters": parameters, **scores})
    with staged(place.adaptation_folder(method, shots, seed)) as staging:
        write_json(staging / RECORD_FILE, {"tasks": records})


def adapt(place: Workplace, method: Method, rows: Rows, seed: int) -> tuple[nn.Module, int | None, int]:
    """The adapted model, the id of the new task in it (None: it takes none), and how many numbers were fitted."""
    settings = place.settings
    if method.inventory is None:
        model: Any = _new_adapter(place, seed)
        if method.scope is not None:
            linlora.linearize(model, method.scope)
        return model, None, _fit(model, rows, settings, method.learning_rate, seed)
    model = load_inventory(place, method.inventory, seed)
    if method.trains == "nothing":
        mhr_mu(model)
        return model, None, 0
    if method.trains == "adapter":
        model = collapse(model)
        if method.scope is not None:
            linlora.linearize(model, method.scope)
        return model, None, _fit(model, rows, settings, method.learning_rate, seed)
    if method.scope is not None:
        linlora.linearize(model, method.scope)
    if method.trains == "weights":
        batch = {"pixel_values": rows.images, "question_ids": rows.question_ids, "labels": rows.labels}
        weights = fit_routing(model, [batch], "logistic", ridge=settings.ridge).weights
        return model, add_task(model, weights), sum(w.numel() for w in weights.values())
    mhr_z(model)
    if method.trains == "all":
        for skill in model.skills():
            skill.requires_grad_(True)
    task = model.n_tasks - 1
    return model, task, _fit(model, rows, settings, method.learning_rate, seed, task)


def _new_adapter(place: Workplace, seed: int) -> nn.Module:
    settings = place.settings
    reader = place.reader()  # reading one draws
    torch.manual_seed(seed)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear")
    return get_peft_model(reader, config).to(place.device).eval()


def _fit(
    model: nn.Module, rows: Rows, settings: RoutingSettings, learning_rate: float, seed: int, task: int | None = None
) -> int:
    """Train what asks for a gradient; returns how many numbers that is."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(index: Tensor) -> Tensor:
        batch = rows[index]
        return model(
            pixel_values=batch.images, question_ids=batch.question_ids, labels=batch.labels, **_routing(task, batch)
        ).loss

    steps = settings.adaptation_steps
    groups = _groups(model, parameters, settings, learning_rate)
    for _ in descend(groups, steps, batches(len(rows), settings.adaptation_batch, steps, seed), loss):
        pass
    return sum(parameter.numel() for parameter in parameters)


def _groups(
    model: nn.Module, parameters: list[nn.Parameter], settings: RoutingSettings, learning_rate: float
) -> list[dict[str, Any]]:
    """Where skills and logits train together, the logits have the larger rate, as in the training of the inventory."""
    logits = list(model.selectors.parameters()) if isinstance(model, RoutedModel) else []
    skills = [p for p in parameters if not any(p is logit for logit in logits)]
    faster = settings.logits_learning_rate / settings.learning_rate if skills else 1.0
    groups = [
        {"params": skills, "lr": learning_rate, "weight_decay": settings.weight_decay},
        {"params": [p for p in logits if p.requires_grad], "lr": faster * learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _routing(task: int | None, rows: Rows) -> dict[str, Tensor]:
    return {} if task is None else {"task_ids": torch.full((len(rows),), task)}
