"""The factors A and B of the ΔW that a vector adds to a layer: their sizes, values and sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linlora.layers.vanilla import refuse_changed_base
from linlora.layers.weights import Update, stacked
from linlora.storage.ahead import Ahead
from linlora.storage.tensors import StoredTensors, shapes, wide
from linlora.vectors.task_vector import TaskVector


class Size(NamedTuple):
    """(N, K), the rank, and the dtype of the factors of a layer."""

    outputs: int
    inputs: int
    rank: int
    dtype: torch.dtype


def stored_factors(sizes: Mapping[str, Size], factors: Callable[[str], tuple[Tensor, Tensor]]) -> StoredTensors:
    """The tensors '<layer>.dA' and '<layer>.dB' of a weight vector, computed by layer when they are asked for.

    A and B of a layer are one computation. Asked for in their order, the next layers are computed ahead
    (linlora.storage.ahead).

    Args:
        factors: returns (A, B) of a layer.
    """
    like = {}
    for layer, size in sizes.items():
        like[f"{layer}.dA"] = torch.empty(size.rank, size.inputs, dtype=size.dtype, device="meta")
        like[f"{layer}.dB"] = torch.empty(size.outputs, size.rank, dtype=size.dtype, device="meta")
    made = Ahead(sizes, factors)

    def read(name: str) -> Tensor:
        layer, _, kind = name.rpartition(".")
        return made(layer)[kind == "dB"]

    return StoredTensors(like, read)


def factors_of(vector: TaskVector, layer: str) -> tuple[Tensor, Tensor]:
    """(A', B') with ΔW = s B' A' of a layer of a vector, in float32 or wider: the factors of an adapter in its place.

    Raises ValueError for a vector of scope "model", which folds into no weight, for one without its point, and for one
    of base weights that its start changed.

    >>> point, deltas = {"q.A0": torch.ones(1, 2)}, {"q.dB": torch.ones(3, 1)}
    >>> A, B = factors_of(TaskVector(deltas, point, "", {"q": 0.5}, "layer"), "q")
    >>> (B @ A).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    if vector.scope == "model":
        raise ValueError(
            "no LoRA adapter, and no weight, has the function of a network linearized as a whole (scope 'model'). Run "
            "it in linlora, or give up the exact function: vector.cast('layer')"
        )
    refuse_changed_base(vector.changed_base, "the vector")
    A0, B0, dA, dB = _of_layer(vector, layer)
    if vector.scope == "layer":
        assert A0 is not None
        return stacked(A0, B0, dA, dB)
    return stacked(_sum(A0, dA), None, None, _sum(B0, dB))


def change_of_weight(vector: TaskVector, layer: str) -> Update:
    """The change of a layer's ΔW from its start: s (dB A0 + B0 dA) linearized, s (B A - B0 A0) plain.

    >>> point, deltas = {"q.A0": torch.ones(1, 2)}, {"q.dB": torch.ones(3, 1)}
    >>> update = change_of_weight(TaskVector(deltas, point, "", {"q": 0.5}, "model"), "q")
    >>> (update.B @ update.A).tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    A0, B0, dA, dB = _of_layer(vector, layer)
    scaling = vector.scalings[layer]
    if vector.scope in ("layer", "model"):
        assert A0 is not None
        parts = [(A0, dB)] if B0 is None or dA is None else [(A0, dB), (dA, B0)]
    else:
        parts = [(_sum(A0, dA), _sum(B0, dB))] + ([] if A0 is None or B0 is None else [(A0, -B0)])
    return Update(torch.cat([A for A, _ in parts]).float(), scaling * torch.cat([B for _, B in parts], dim=1).float())


def total(updates: Sequence[Update]) -> Update:
    """Σ ΔW: factors side by side; where some share A, their B are added, so that a vector minus itself is zero."""
    As: list[Tensor] = []
    Bs: list[Tensor] = []
    for update in updates:
        same = next((i for i, A in enumerate(As) if A.shape == update.A.shape and torch.equal(A, update.A)), None)
        if same is None:
            As.append(update.A)
            Bs.append(update.B)
        else:
            Bs[same] = Bs[same] + update.B
    return Update(torch.cat(As), torch.cat(Bs, dim=1))


def size_of(vector: TaskVector, layer: str) -> Size:
    """The size of the factors that `factors_of` gives; no tensor is read."""
    point, deltas = shapes(vector.point or {}), shapes(vector.deltas)
    A, dB = point[f"{layer}.A0"], deltas[f"{layer}.dB"]
    dtype = wide(A.dtype, dB.dtype, point.get(f"{layer}.B0", A).dtype, deltas.get(f"{layer}.dA", A).dtype)
    pair = vector.scope == "layer" and f"{layer}.B0" in point and f"{layer}.dA" in deltas
    return Size(dB.shape[0], A.shape[1], A.shape[0] * (1 + pair), dtype)


def _of_layer(vector: TaskVector, layer: str) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """A0, B0, dA, dB; None for zero."""
    point = vector.known_point("ΔW")
    A0, B0 = (point.get(f"{layer}.{kind}") for kind in ("A0", "B0"))
    return A0, B0, vector.deltas.get(f"{layer}.dA"), vector.deltas[f"{layer}.dB"]


def _sum(start: Tensor | None, delta: Tensor | None) -> Tensor:
    assert delta is not None
    dtype = wide(delta.dtype, *(() if start is None else (start.dtype,)))
    return delta if start is None else start.to(dtype) + delta.to(dtype)
