"""LoRA adapters as what they add to the weights: vectors whose sums are sums of ΔW, without cross terms of factors.

A plain LoRA vector (dA, dB) from (A0, B0) changes a weight by

    ΔWᵢ = s [(B0 + dBᵢ)(A0 + dAᵢ) − B0 A0] = s (Bᵢ Aᵢ − B0 A0)

Adding factors, Σ λᵢ (dAᵢ, dBᵢ), also adds every dBᵢ dAⱼ, i ≠ j. Σ λᵢ ΔWᵢ itself is a LoRA of the summed rank:

    A* = [A1; …; An; A0]        B*ᵢ = [0 … Bᵢ … 0, −B0]        ΔWᵢ = s B*ᵢ A*

A* is common to all, so (A*, B*ᵢ) are layer-scope vectors of one linearization point, at B0 = 0, of a base that the
starting adapter is merged into; whatever is linear in vectors is then linear in ΔW. What acts on single elements (TIES,
DARE) has to see those of ΔW: `dense`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from linlora.vectors.task_vector import TaskVector


def stacked(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """Plain LoRA vectors of one point as layer-scope vectors (A*, B*ᵢ), for a base with the start merged into it.

    >>> point = {"q.A0": torch.tensor([[1.0, 0.0]]), "q.B0": torch.zeros(2, 1)}
    >>> one = {"q.dA": torch.tensor([[0.0, 1.0]]), "q.dB": torch.tensor([[1.0], [2.0]])}
    >>> vector = TaskVector(one, point, "", {"q": 1.0}, "lora")
    >>> first, second = stacked([vector, 2.0 * vector])
    >>> first.deltas["q.dB"] @ first.point["q.A0"], second.deltas["q.dB"].tolist()
    (tensor([[1., 1.],
            [2., 2.]]), [[0.0, 2.0], [0.0, 4.0]])
    """
    _check_plain(vectors)
    n, first = len(vectors), vectors[0]
    point: dict[str, Tensor] = {}
    deltas: list[dict[str, Tensor]] = [{} for _ in vectors]  # by layer
    for layer in first.scalings:
        A0, B0, started = _start(first, layer)
        parts = [_factors(vector, layer) for vector in vectors]
        point[layer] = torch.cat([A for A, _ in parts] + [A0] * started)
        for i, (_, B) in enumerate(parts):
            blocks = [B if i == j else torch.zeros_like(B) for j in range(n)]
            deltas[i][layer] = torch.cat(blocks + [-B0] * started, dim=1)
    return [_at_zero(first, point, of_vector) for of_vector in deltas]


def frozen_a(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """LoRA-FA vectors (dA = 0) as layer-scope vectors (A0, dB), for a base with the start merged into it: exact."""
    _check_plain(vectors)
    for vector in vectors:
        if any(delta.any() for name, delta in vector.deltas.items() if name.endswith(".dA")):
            raise ValueError("frozen_a: a vector of LoRA-FA is expected, but A was trained")
    point = {layer: _start(vectors[0], layer)[0] for layer in vectors[0].scalings}
    return [_at_zero(vector, point, {layer: vector.deltas[f"{layer}.dB"] for layer in point}) for vector in vectors]


def dense(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """Plain LoRA vectors of one point as their ΔW, '<layer>.dW' (N, K) of every layer: as large as the weights.

    >>> point = {"q.A0": torch.tensor([[1.0, 0.0]]), "q.B0": torch.zeros(2, 1)}
    >>> one = {"q.dA": torch.tensor([[0.0, 1.0]]), "q.dB": torch.tensor([[1.0], [2.0]])}
    >>> dense([TaskVector(one, point, "", {"q": 0.5}, "lora")])[0].deltas["q.dW"].tolist()
    [[0.5, 0.5], [1.0, 1.0]]
    """
    _check_plain(vectors)
    return [
        replace(vector, deltas={f"{layer}.dW": delta_weight(vector, layer) for layer in vector.scalings})
        for vector in vectors
    ]


def delta_weight(vector: TaskVector, layer: str) -> Tensor:
    """ΔW (N, K) of one layer of a plain LoRA vector."""
    A0, B0, _ = _start(vector, layer)
    A, B = _factors(vector, layer)
    return vector.scalings[layer] * (B @ A - B0 @ A0)


def cosines(vectors: Sequence[TaskVector]) -> np.ndarray:
    """The cosines between the ΔW of plain LoRA vectors, from factors: ⟨P Q, R S⟩ = Σ (Pᵀ R) ⊙ (Q Sᵀ), in float64.

    >>> point = {"q.A0": torch.tensor([[1.0, 0.0]]), "q.B0": torch.zeros(2, 1)}
    >>> u, v = ({"q.dA": torch.zeros(1, 2), "q.dB": torch.tensor(B)} for B in ([[1.0], [0.0]], [[3.0], [4.0]]))
    >>> cosines([TaskVector(delta, point, "", {"q": 1.0}, "lora") for delta in (u, v)]).round(6).tolist()
    [[1.0, 0.6], [0.6, 1.0]]
    """
    _check_plain(vectors)
    gram = np.zeros((len(vectors), len(vectors)))
    for layer, scaling in vectors[0].scalings.items():
        A0, B0, _ = _start(vectors[0], layer)
        A0, B0 = A0.double(), B0.double()
        parts = []
        for vector in vectors:
            A, B = (factor.double() for factor in _factors(vector, layer))
            parts.append((torch.cat([B, -B0], dim=1), torch.cat([A, A0])))
        for i, (P, Q) in enumerate(parts):
            for j, (R, S) in enumerate(parts[: i + 1]):
                gram[i, j] += scaling**2 * float(((P.T @ R) * (Q @ S.T)).sum())
    gram = gram + np.tril(gram, -1).T
    norms = np.sqrt(gram.diagonal())
    products = np.outer(norms, norms)
    return np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)


def merged_start(base: nn.Module, vector: TaskVector) -> nn.Module:
    """A copy of a base model with the adapter that a plain LoRA vector started from, s B0 A0, merged into it."""
    start = {}
    for layer, scaling in vector.scalings.items():
        A0, B0, _ = _start(vector, layer)
        start[layer] = scaling * (B0 @ A0)
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
            change = changes[name].to(layer.weight.device)
            layer.weight.copy_(self.original[name] + (change.T if isinstance(layer, Conv1D) else change))


def _at_zero(like: TaskVector, A0: Mapping[str, Tensor], dB: Mapping[str, Tensor]) -> TaskVector:
    """The layer-scope vector of (A0, dB) by layer, at B0 = 0."""
    point = {f"{layer}.A0": A for layer, A in A0.items()} | {
        f"{layer}.B0": torch.zeros_like(B) for layer, B in dB.items()
    }
    deltas = {f"{layer}.dA": torch.zeros_like(A) for layer, A in A0.items()}
    deltas |= {f"{layer}.dB": B for layer, B in dB.items()}
    return replace(like, deltas=deltas, point=point).cast("layer")


def _check_plain(vectors: Sequence[TaskVector]) -> None:
    if not vectors:
        raise ValueError("no vectors were given")
    for vector in vectors:
        if vector.scope != "lora":
            raise ValueError(
                f"a vector of plain LoRA is expected, got one of scope '{vector.scope}', whose factors add exactly"
            )
        if vector.point is None:
            raise ValueError("the vector was saved without its point, so its ΔW is not known")
        vectors[0].check_same_point(vector)


def _start(vector: TaskVector, layer: str) -> tuple[Tensor, Tensor, bool]:
    """A0, B0, and whether they change anything."""
    point = vector.point or {}
    A0, B0 = point[f"{layer}.A0"], point[f"{layer}.B0"]
    return A0, B0, bool(B0.any())


def _factors(vector: TaskVector, layer: str) -> tuple[Tensor, Tensor]:
    """A and B as they were trained."""
    A0, B0, _ = _start(vector, layer)
    return A0 + vector.deltas[f"{layer}.dA"], B0 + vector.deltas[f"{layer}.dB"]
