"""A model that holds a task vector, made from the vector alone: an adapter of its ranks, at its point and scope."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from linlora.layers.linearize import accelerate, linearize
from linlora.vectors.task_vector import TaskVector, apply
from linlora.vectors.weight_vector import WeightVector


def model_for(base: nn.Module, vector: TaskVector, trained_modules: Sequence[str] = ()) -> PeftModel:
    """A copy of a plain base model with an adapter in it that holds the vector, and any other of the same point.

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
    config = LoraConfig(
        target_modules=list(ranks), r=next(iter(ranks.values())), fan_in_fan_out=_transposed(base, ranks),
        modules_to_save=list(trained_modules) or None,
        rank_pattern={re.escape(layer): rank for layer, rank in ranks.items()},
        alpha_pattern={re.escape(layer): alpha for layer, alpha in alphas.items()},
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config).eval()
    if vector.scope in ("lora", "weight"):
        accelerate(model)
    else:
        linearize(model, scope=vector.scope, point=vector)
    apply(model, vector)
    return model


def _transposed(base: nn.Module, layers: dict[str, int]) -> bool:
    return any(isinstance(base.get_submodule(layer), Conv1D) for layer in layers)
