"""The model of a run: a base model with its adapter, at its linearization point, ready to train by its method."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from linlora import formats
from linlora.layers.linearize import accelerate, linearize
from linlora.layers.report import Report
from linlora.training.checkpoints import quiet
from linlora.training.settings import Settings
from linlora.training.task import Task
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector


@dataclass(frozen=True)
class Adapted:
    """A model that has not been trained yet.

    Attributes:
        model: the PeftModel, plain or linearized.
        start: its task vector, zero, with the linearization point.
        report: what was done to its layers.
    """

    model: PeftModel
    start: TaskVector
    report: Report


def adapt(
    task: Task, point: TaskVector | None = None, method: str | None = None, holding: WeightVector | None = None
) -> Adapted:
    """The model of a task's settings at its start: at `point`, at that of the settings, or drawn from their seed.

    Runs of one model, seed and LoRA settings draw one point, whatever their data sets are. `method` goes before that of
    the settings. To hold a vector in weight space, the adapter has its layers and ranks.
    """
    settings = task.settings
    method = method or settings.method
    point = point or (read_point(settings) if holding is None else None)
    base = task.base_model()
    torch.manual_seed(settings.seed)  # what came before it, a head of another size, has no say in the point
    try:
        with quiet():
            model = get_peft_model(base, lora_config(task, base, holding))
    except (ValueError, TypeError, AttributeError, NotImplementedError, re.error) as error:  # PEFT's own, of odd values
        layers = sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"lora: {error} The linear layers of {settings.model} are {', '.join(layers)}") from error
    if point is not None:
        point.move_point(model)
    if method in ("layer", "model"):
        report = linearize(model, method)
    else:
        if method == "lora-fa":
            freeze_A(model)
        report = accelerate(model)
    return Adapted(model, TaskVector.from_model(model), report)


def lora_config(task: Task, base: nn.Module, holding: WeightVector | None = None) -> LoraConfig:
    """PEFT's configuration for the LoRA settings of a task, or for a vector in weight space."""
    options: dict[str, Any] = dict(task.settings.lora)
    if holding is not None:
        sizes = holding.sizes()
        rank = max(size.rank for size in sizes.values())
        kept: dict[str, Any] = {n: options[n] for n in ("fan_in_fan_out", "modules_to_save") if n in options}
        options = {"r": rank, "lora_alpha": rank, "target_modules": list(sizes), **kept}
    if task.settings.head == "trained" and (head := task.head_modules(base)):
        options["modules_to_save"] = sorted({*options.get("modules_to_save", []), *head})
    return LoraConfig(**options, task_type=task.task_type)


def read_point(settings: Settings) -> TaskVector | None:
    """The linearization point the settings name."""
    if settings.point is None:
        return None
    return formats.read(settings.point)


def freeze_A(model: nn.Module) -> None:
    """LoRA-FA: B alone trains."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
