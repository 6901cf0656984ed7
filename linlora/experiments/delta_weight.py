"""Adapters as what they add to the weights of their common start: ΔWᵢ = s (Bᵢ Aᵢ − B0 A0).

Adding the factors of plain LoRA, Σ λᵢ (dAᵢ, dBᵢ), also adds every dBᵢ dAⱼ, i ≠ j; adding ΔW does not. `in_weights` are
vectors in weight space, of a base that the start is merged into. Methods that pick single values see those of ΔW:
`dense`. AdaMerging needs vectors that are linear in one set of parameters: `stacked`, layer-scope vectors at B0 = 0 of

    A* = [A1; …; An]        B*ᵢ = [0 … s Bᵢ … 0]        ΔWᵢ = B*ᵢ A*
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from linlora.layers.weights import Update
from linlora.vectors.factors import change_of_weight
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector, weight_vector


def in_weights(vectors: Sequence[TaskVector]) -> list[WeightVector]:
    """The ΔW of vectors of scope "lora" or "layer" and of one point, whose base has the start merged into it.

    >>> point = {"q.A0": torch.tensor([[1.0, 0.0]]), "q.B0": torch.zeros(2, 1)}
    >>> one = {"q.dA": torch.tensor([[0.0, 1.0]]), "q.dB": torch.tensor([[1.0], [2.0]])}
    >>> (vector,) = in_weights([TaskVector(one, point, "", {"q": 0.5}, "lora")])
    >>> (vector.update("q").B @ vector.update("q").A).tolist()
    [[0.5, 0.5], [1.0, 1.0]]
    """
    _check(vectors)
    found = []
    for vector in vectors:
        changes = {layer: change(vector, layer) for layer in vector.scalings}
        deltas = {f"{layer}.dA": update.A for layer, update in changes.items()}
        deltas |= {f"{layer}.dB": update.B for layer, update in changes.items()}
        found.append(weight_vector(vector, deltas, dict.fromkeys(changes, 1.0)))
    return found


def stacked(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """The same as layer-scope vectors (A*, B*ᵢ) of one point."""
    _check(vectors)
    point: dict[str, Tensor] = {}
    deltas: list[dict[str, Tensor]] = [{} for _ in vectors]
    for layer in vectors[0].scalings:
        changes = [change(vector, layer) for vector in vectors]
        A = torch.cat([update.A for update in changes])
        point |= {f"{layer}.A0": A, f"{layer}.B0": A.new_zeros(changes[0].B.shape[0], len(A))}
        for i, of_vector in enumerate(deltas):
            blocks = [update.B if i == j else torch.zeros_like(update.B) for j, update in enumerate(changes)]
            of_vector |= {f"{layer}.dA": torch.zeros_like(A), f"{layer}.dB": torch.cat(blocks, dim=1)}
    scalings = dict.fromkeys(vectors[0].scalings, 1.0)
    like = replace(vectors[0], scope="lora", scalings=scalings, point=point)
    return [replace(like, deltas=of_vector).cast("layer") for of_vector in deltas]


def dense(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """The same as matrices, '<layer>.dW' (N, K) of every layer: as large as the weights.

    >>> point = {"q.A0": torch.tensor([[1.0, 0.0]]), "q.B0": torch.zeros(2, 1)}
    >>> one = {"q.dA": torch.tensor([[0.0, 1.0]]), "q.dB": torch.tensor([[1.0], [2.0]])}
    >>> dense([TaskVector(one, point, "", {"q": 0.5}, "lora")])[0].deltas["q.dW"].tolist()
    [[0.5, 0.5], [1.0, 1.0]]
    """
    _check(vectors)
    return [replace(v, deltas={f"{layer}.dW": _matrix(change(v, layer)) for layer in v.scalings}) for v in vectors]


def change(vector: TaskVector, layer: str) -> Update:
    """ΔW of one layer as factors, without columns of B that are zero (those of B0 = 0)."""
    update = change_of_weight(vector, layer)
    used = update.B.any(dim=0)
    return Update(update.A[used], update.B[:, used]) if used.any() else Update(update.A[:1], update.B[:, :1])


def merged_start(base: nn.Module, vector: TaskVector) -> nn.Module:
    """A copy of a base model with the adapter that a vector started from, s B0 A0, merged into it."""
    point = vector.point or {}
    start = {
        layer: scaling * (point[f"{layer}.B0"] @ point[f"{layer}.A0"])
        for layer, scaling in vector.scalings.items()
        if f"{layer}.B0" in point
    }
    model = copy.deepcopy(base)
    Weights(model, start).put(start)
    return model


class Weights:
    """Some weights of a plain model, to which changes are added: W + ΔW of what was put there last."""

    def __init__(self, model: nn.Module, layers: Mapping[str, object]) -> None:
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
        self.original = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    @torch.no_grad()
    def put(self, changes: Mapping[str, Tensor]) -> None:
        """Let the weights be the original ones plus ΔW (N, K) by layer."""
        for name, layer in self.layers.items():
            added = changes[name].to(layer.weight.device)
            layer.weight.copy_(self.original[name] + (added.T if isinstance(layer, Conv1D) else added))


def _matrix(update: Update) -> Tensor:
    return update.B @ update.A


def _check(vectors: Sequence[TaskVector]) -> None:
    if not vectors:
        raise ValueError("no vectors were given")
    for vector in vectors:
        if vector.scope not in ("lora", "layer"):
            raise ValueError(f"a vector of plain LoRA or of layer scope is expected, got one of scope '{vector.scope}'")
        vectors[0].check_same_point(vector)
