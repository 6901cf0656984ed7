"""The controls: what the same adapters, or adapters trained otherwise, are when they are added.

| control | trained | added | the function of the sum |
|---|---|---|---|
| `factors` | A and B of plain LoRA | A and B: the cross terms dBᵢ dAⱼ come with them | LoRA |
| `delta_weight` | the same adapters | ΔW = s B A: no cross terms | W + Σ λᵢ ΔWᵢ |
| `lora_fa` | B of plain LoRA, A frozen | B, which is ΔW | W + Σ λᵢ ΔWᵢ |
| `layer` | every layer linearized | (dA, dB), which is ΔW | W + Σ λᵢ ΔWᵢ |
| `model` | the network linearized | (dA, dB), which is the function | f(φ0) + Σ λᵢ J δᵢ |

`lora_fa` and `layer` are one at B0 = 0, where a linearized layer is x Wᵀ + s (x A0ᵀ) dBᵀ: LoRA with A frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from linlora.comparison import delta_weight
from linlora.comparison.models import model_for
from linlora.fusion import cosines
from linlora.vectors.task_vector import TaskVector, apply

Trained = Literal["lora", "lora-fa", "layer", "model"]  # how an adapter was trained
ELEMENTWISE = ("ties", "dare")  # methods that are not linear in the vectors: of ΔW they have to see the elements


@dataclass(frozen=True)
class Control:
    """One row of the comparison: the adapters of which training, and what of them is added."""

    key: str
    title: str
    trained: Trained


CONTROLS = (
    Control("factors", "LoRA, factors added", "lora"),
    Control("delta_weight", "LoRA, ΔW added", "lora"),
    Control("lora_fa", "LoRA-FA (A frozen)", "lora-fa"),
    Control("layer", "linearized, layer scope", "layer"),
    Control("model", "linearized, model scope", "model"),
)
BY_KEY = {control.key: control for control in CONTROLS}


@dataclass(frozen=True)
class Space:
    """Where a fusion happens: vectors that a method takes, a model, and how a fused vector is put into it."""

    vectors: list[TaskVector]
    model: nn.Module
    put: Callable[[TaskVector], None]


def space(
    control: Control, base: nn.Module, vectors: Sequence[TaskVector], method: str, trained_modules: Sequence[str] = ()
) -> Space:
    """The space of a control in which a method acts.

    Args:
        base: the plain base model; it is copied.
        vectors: the trained vectors, as `TaskVector.from_model` reads them: of scope "lora" for plain training, with
            the point they started from, and of the scope of the linearization otherwise.
        method: a name of `linlora.fusion.METHODS`.
        trained_modules: of the base, trained beside the adapters.
    """
    if control.key == "delta_weight" and method in ELEMENTWISE:
        return _of_weights(delta_weight.merged_start(base, vectors[0]), delta_weight.dense(vectors))
    if control.key in ("delta_weight", "lora_fa"):
        convert = delta_weight.stacked if control.key == "delta_weight" else delta_weight.frozen_a
        return _of_adapter(delta_weight.merged_start(base, vectors[0]), convert(vectors), trained_modules)
    return _of_adapter(base, list(vectors), trained_modules)


def cosine_matrix(control: Control, vectors: Sequence[TaskVector]) -> np.ndarray:
    """The cosines between what a control adds."""
    if control.key == "delta_weight":
        return delta_weight.cosines(vectors)
    return cosines(delta_weight.frozen_a(vectors) if control.key == "lora_fa" else vectors)


def _of_adapter(base: nn.Module, vectors: list[TaskVector], trained_modules: Sequence[str]) -> Space:
    model = model_for(base, vectors[0], trained_modules)
    return Space(vectors, model, lambda fused: apply(model, fused))


def _of_weights(model: nn.Module, vectors: list[TaskVector]) -> Space:
    weights = delta_weight.Weights(model, vectors[0].scalings)
    layers = list(vectors[0].scalings)
    return Space(vectors, model, lambda fused: weights.put({name: fused.deltas[f"{name}.dW"] for name in layers}))
