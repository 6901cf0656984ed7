"""A base model with an adapter: at its start, ready to train, and holding a task vector."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from linlora import formats
from linlora.layers.linearize import accelerate, linearize
from linlora.layers.report import Report
from linlora.training.checkpoints import quiet
from linlora.training.settings import Settings
from linlora.training.task import Task
from linlora.vectors.task_vector import TaskVector, apply
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


def adapt(task: Task, point: TaskVector | None = None, method: str | None = None) -> Adapted:
    """The model of a task's settings at its start: at `point`, at that of the settings, or drawn from their seed.

    Runs of one model, seed and LoRA settings draw one point, whatever their data sets are. `method` goes before that of
    the settings.
    """
    settings = task.settings
    method = method or settings.method
    point = point or read_point(settings)
    base = task.base_model()
    torch.manual_seed(settings.seed)  # what came before it, a head of another size, has no say in the point
    try:
        with quiet():
            model = get_peft_model(base, lora_config(task, base))
    except (ValueError, TypeError, AttributeError, NotImplementedError, re.error) as error:  # PEFT's own, of odd values
        layers = sorted({name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
        if unmatched := _unmatched(settings.lora.get("target_modules"), base):
            raise ValueError(
                f"lora.target_modules: {settings.model} has no layer {', '.join(map(repr, unmatched))}; its linear "
                f"layers end in {', '.join(layers)}"
            ) from error
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


def _unmatched(targets: Any, base: nn.Module) -> list[str]:
    """The targets, names of layers or the end of one, that no module has, where all are such."""
    if not (isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
        return []
    names = [f".{name}" for name, _ in base.named_modules()]
    return [] if any(name.endswith(f".{target}") for target in targets for name in names) else targets


def lora_config(task: Task, base: nn.Module) -> LoraConfig:
    """PEFT's configuration for the LoRA settings of a task."""
    options = {**task.settings.lora, "modules_to_save": task.trained_modules(base) or None}
    return LoraConfig(**options, task_type=task.task_type)


def model_for(
    base: nn.Module, vector: TaskVector, trained_modules: Sequence[str] = (), task_type: str | None = None
) -> PeftModel:
    """A plain base model with an adapter in it that holds a vector, and any other of the same point.

    `trained_modules` were trained beside the adapter (`modules_to_save`): at model scope the stream ends before them.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> held = model_for(linlora.testing.tiny_base("bert"), TaskVector.from_model(model))
    >>> batch = linlora.testing.tiny_batch("bert")
    >>> bool((held(**batch).logits == model(**batch).logits).all())
    True
    """
    if vector.point is None:
        raise ValueError("the vector was saved without its point, so no model can be made for it")
    ranks, alphas = {}, {}
    for layer, scaling in vector.scalings.items():
        in_weights = isinstance(vector, WeightVector)  # whose scaling, if a multiple, may be zero
        ranks[layer] = (vector.deltas[f"{layer}.dA"] if in_weights else vector.point[f"{layer}.A0"]).shape[0]
        alphas[layer] = ranks[layer] * (1.0 if in_weights else scaling)
    transposed = any(isinstance(base.get_submodule(layer), Conv1D) for layer in ranks)
    config = LoraConfig(
        target_modules=list(ranks), r=next(iter(ranks.values())), fan_in_fan_out=transposed, task_type=task_type,
        modules_to_save=list(trained_modules) or None,
        rank_pattern={re.escape(layer): rank for layer, rank in ranks.items()},
        alpha_pattern={re.escape(layer): alpha for layer, alpha in alphas.items()},
    )  # fmt: skip
    model = get_peft_model(base, config).eval()
    if vector.scope in ("lora", "weight"):
        accelerate(model)
    else:
        linearize(model, scope=vector.scope, point=vector)
    apply(model, vector)
    return model


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
