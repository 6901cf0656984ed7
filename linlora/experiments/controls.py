"""The controls of a comparison: how each kind of adapter is trained, and what of it is added.

| control | trained | added | the function of the sum |
|---|---|---|---|
| `factors` | A and B of plain LoRA | A and B: the cross terms dBᵢ dAⱼ come with them | LoRA |
| `delta_weight` | the same adapters | ΔW = s B A: no cross terms | W + Σ λᵢ ΔWᵢ |
| `lora_fa` | B of plain LoRA, A frozen | B, which is ΔW | W + Σ λᵢ ΔWᵢ |
| `layer` | every layer linearized | (dA, dB), which is ΔW | W + Σ λᵢ ΔWᵢ |
| `model` | the network linearized | (dA, dB), which is the function | f(φ0) + Σ λᵢ J δᵢ |
| `features` | the same, up to the features | (dA, dB), which is the features | normalised (f(φ0) + Σ λᵢ J δᵢ) Pᵀ |

`lora_fa` and `layer` are one at B0 = 0, where a linearized layer is x Wᵀ + s (x A0ᵀ) dBᵀ: LoRA with A frozen.
`features` is there for heads that leave open where the linearized function ends (`linlora.training.similarity`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from linlora.experiments import delta_weight
from linlora.fusion import cosines, fuse
from linlora.fusion.registry import IN_WEIGHT_SPACE
from linlora.training.adapted import model_for
from linlora.vectors.task_vector import TaskVector, apply
from linlora.vectors.weight_vector import WeightVector

Trained = Literal["lora", "lora-fa", "layer", "model", "features"]
"""How an adapter was trained."""

TRAINED_TITLES: dict[Trained, str] = {
    "lora": "LoRA", "lora-fa": "LoRA-FA", "layer": "layer scope", "model": "model scope",
    "features": "model scope up to the features",
}  # fmt: skip

Start = Literal["zero", "warm"]
"""Where adapters start: at B0 = 0, or at an adapter that was trained before."""

START_TITLES: dict[Start, str] = {"zero": "B0 = 0", "warm": "B0 ≠ 0"}
START_NOTES: dict[Start, str] = {
    "zero": "LoRA-FA is layer scope at B0 = 0: x Wᵀ + s (x A0ᵀ) dBᵀ is both.",
    "warm": "The adapters start from a warm-up on all tasks, common to those of a seed.",
}

ELEMENTWISE = ("ties", "dare")
"""Methods that are not linear in the vectors and act on single values: of ΔW they see matrices."""

ON_WEIGHTS = (*IN_WEIGHT_SPACE, "regmean")
"""Methods of ΔW alone."""


@dataclass(frozen=True)
class Control:
    """One column of the comparison: the adapters of which training, and what of them is added."""

    key: str
    title: str
    short: str
    trained: Trained

    def fits(self, method: str) -> bool:
        """Whether a method acts on what is added."""
        return method not in ON_WEIGHTS or self.key not in ("factors", "model", "features")


CONTROLS = (
    Control("factors", "LoRA, factors added", "LoRA factors", "lora"),
    Control("delta_weight", "LoRA, ΔW added", "LoRA ΔW", "lora"),
    Control("lora_fa", "LoRA-FA (A frozen)", "LoRA-FA", "lora-fa"),
    Control("layer", "linearized, layer scope", "layer scope", "layer"),
    Control("model", "linearized, model scope", "model scope", "model"),
    Control("features", "linearized, model scope up to the features", "model scope to features", "features"),
)
BY_KEY = {control.key: control for control in CONTROLS}
SHORT = {key: control.short for key, control in BY_KEY.items()}
_ADDED_AS_WEIGHTS = ("delta_weight", "lora_fa")


@dataclass(frozen=True)
class Space:
    """The place of a fusion: vectors that a method takes, the plain model they are relative to, which is read when a
    method asks for it, a model that holds them, and how a fused vector is put into it."""

    vectors: Sequence[TaskVector]
    base: Callable[[], nn.Module]
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
    if control.key not in _ADDED_AS_WEIGHTS and method not in ON_WEIGHTS:
        return of_adapter(base, vectors, trained_modules)
    start = delta_weight.merged_start(base, vectors[0])
    if method in ELEMENTWISE:
        return _of_weights(start, delta_weight.dense(vectors))
    convert = delta_weight.stacked if method == "adamerging" else delta_weight.in_weights
    return of_adapter(start, convert(vectors), trained_modules)


def kind_of_space(control: Control, method: str) -> str:
    """A key that methods which act in one space share."""
    if control.key not in _ADDED_AS_WEIGHTS and method not in ON_WEIGHTS:
        return "adapter"
    return method if method in (*ELEMENTWISE, "adamerging") else "weights"


def cosine_matrix(control: Control, vectors: Sequence[TaskVector]) -> np.ndarray:
    """The cosines between what a control adds."""
    return cosines(delta_weight.in_weights(vectors) if control.key in _ADDED_AS_WEIGHTS else vectors)


def of_adapter(base: nn.Module, vectors: Sequence[TaskVector], trained_modules: Sequence[str] = ()) -> Space:
    """A model with an adapter that holds each of some vectors and whatever is fused of them."""
    in_weights = isinstance(vectors[0], WeightVector)
    model = model_for(
        copy.deepcopy(base), fuse(list(vectors), "average") if in_weights else vectors[0], trained_modules
    )
    return Space(vectors, lambda: base, model, lambda fused: apply(model, fused))


def _of_weights(model: nn.Module, vectors: Sequence[TaskVector]) -> Space:
    weights = delta_weight.Weights(model, vectors[0].scalings)
    layers = list(vectors[0].scalings)

    def put(fused: TaskVector) -> None:
        weights.put({name: fused.deltas[f"{name}.dW"] for name in layers})

    return Space(vectors, lambda: model, model, put)
