"""Fuses vectors in weight space layer by layer: a method merges the ΔW of one layer, `fused_layers` runs it.

    of vectors in memory            every layer at once
    of vectors that lie in files    a layer when it is asked for: the fused vector lies in files as its parts do

A method sees the factors of the adapters that change a layer, sorted by their values: the order in which adapters are
given changes no bit of the fused vector.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from linlora.fusion.truncation import Cut, OutRank, Spectrum
from linlora.layers.weights import Update, one_thread
from linlora.storage.tensors import StoredTensors, finite, memory
from linlora.vectors.factors import Size, stored_factors
from linlora.vectors.points import DifferentPointError
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector, common_base, weight_vector

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """The ΔW of one layer in the vectors that change it.

    Attributes:
        indices: of the vectors that change it, by their place in the list.
        updates: their ΔW, times their weights.
    """

    name: str
    indices: list[int]
    updates: list[Update]


Merge = Callable[[Layer], Update | Spectrum]
"""The ΔW of one layer, one or more, into one."""


def fused_layers(
    vectors: Sequence[WeightVector],
    merge: Merge,
    weights: Sequence[float] | None = None,
    out_rank: OutRank = "exact",
    energy: float | None = None,
) -> WeightVector:
    """The vector a method makes of vectors in weight space, each times its weight, layer by layer.

    Exactly, it has factors of the sum of the ranks, zeros where `merge` needs fewer, so that sizes are known before a
    tensor is read. Cut to a rank, or to an energy, the result is computed at once and held: one adapter of that rank.

    Args:
        out_rank, energy: see `Cut`.
    """
    cut, base_model = Cut(out_rank, energy), common_base(*vectors)
    sizes = fused_sizes(vectors)
    if cut.exact:

        def factors(name: str) -> tuple[Tensor, Tensor]:
            with one_thread():
                return _factors(merge(layer(vectors, name, weights)), sizes[name])

        stored = stored_factors(sizes, factors)
        deltas = stored if all(isinstance(vector.deltas, StoredTensors) for vector in vectors) else dict(stored)
        return weight_vector(vectors[0], deltas, dict.fromkeys(sizes, 1.0), base_model)
    cut_deltas: dict[str, Tensor] = {}
    lost = whole = 0.0
    for name, size in sizes.items():
        with one_thread():
            merged = merge(layer(vectors, name, weights))
            spectrum = merged if isinstance(merged, Spectrum) else Spectrum.of(merged)
        rank = cut.rank(spectrum.values)
        squares = cut.significant(spectrum.values).square()
        lost, whole = lost + float(squares[rank:].sum()), whole + float(squares.sum())
        A, B = _factors(spectrum, size._replace(rank=rank))
        cut_deltas[f"{name}.dA"], cut_deltas[f"{name}.dB"] = A, B
    fused = weight_vector(vectors[0], cut_deltas, dict.fromkeys(sizes, 1.0), base_model)
    return replace(fused, truncation_error=(lost / whole) ** 0.5 if whole else 0.0)


def layer(vectors: Sequence[WeightVector], name: str, weights: Sequence[float] | None = None) -> Layer:
    """The ΔW of a layer, in an order of its values. Raises ValueError where one is not finite."""
    indices = [index for index, vector in enumerate(vectors) if name in vector.scalings]
    updates = [(vectors[i] if weights is None else weights[i] * vectors[i]).update(name) for i in indices]
    for index, update in zip(indices, updates, strict=True):
        if not finite(update.A) or not finite(update.B):
            raise ValueError(f"fuse: layer '{name}' of vector {index + 1} holds NaN or infinity")
    order = order_of_values(updates)
    return Layer(name, [indices[i] for i in order], [updates[i] for i in order])


def fused_sizes(vectors: Sequence[WeightVector]) -> dict[str, Size]:
    """The sizes of the factors of all vectors side by side."""
    sizes: dict[str, Size] = {}
    for vector in vectors:
        for name, size in vector.sizes().items():
            sizes[name] = _beside(sizes.get(name), size)
    return {name: sizes[name] for name in sorted(sizes)}


def _factors(merged: Update | Spectrum, size: Size) -> tuple[Tensor, Tensor]:
    """A and B of a size, filled up with zeros."""
    update = merged.update(size.rank) if isinstance(merged, Spectrum) else merged
    missing = size.rank - len(update.A)
    A, B = update.A.to(size.dtype), update.B.to(size.dtype)
    if missing:
        A, B = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
    return A.contiguous(), B.contiguous()


def _beside(left: Size | None, right: Size) -> Size:
    """The size of the factors of two ΔW side by side, in float32 or wider."""
    rank, dtype = (0, torch.float32) if left is None else (left.rank, left.dtype)
    return right._replace(rank=rank + right.rank, dtype=torch.promote_types(dtype, right.dtype))


def order_of_values(updates: Sequence[Update]) -> list[int]:
    """The places of some ΔW in an order that is a function of their factors alone.

    >>> one, two = Update(torch.ones(1, 2), torch.ones(3, 1)), Update(torch.ones(1, 2), torch.zeros(3, 1))
    >>> order_of_values([one, two]), order_of_values([two, one])
    ([1, 0], [0, 1])
    """
    keys: list[tuple[float, ...]] = [(len(update.A), *update.B[:4].flatten().tolist()) for update in updates]
    if len(set(keys)) < len(keys):  # a few rows do not tell them apart
        keys = [tuple(zlib.crc32(memory(factor.contiguous())) for factor in (u.A, u.B)) for u in updates]
    return sorted(range(len(updates)), key=keys.__getitem__)


def weight_vectors(vectors: Iterable[TaskVector]) -> list[WeightVector]:
    """Vectors in weight space that add, each compared with all before it.

    Raises ValueError for none, DifferentPointError for vectors that do not add.
    """
    found: list[WeightVector] = []
    for vector in vectors:
        if not isinstance(vector, TaskVector):
            raise TypeError(f"fuse: a TaskVector is expected, got {type(vector).__name__}")
        if not isinstance(vector, WeightVector):
            raise DifferentPointError(
                f"fuse: a vector of scope '{vector.scope}' among vectors in weight space, or for a method that works "
                "there; use what it adds to the weights: vector.cast('weight')"
            )
        for other in found:
            other.check_same_point(vector)
        found.append(vector)
    if not found:
        raise ValueError("fuse: no vectors were given")
    return found


def peek(vectors: Iterable[T]) -> tuple[type | None, Iterable[T]]:
    """The class of the first of some vectors, and the vectors; one that comes from a generator is not kept.

    >>> kind, numbers = peek(iter([1, 2]))
    >>> kind, list(numbers)
    (<class 'int'>, [1, 2])
    """
    if isinstance(vectors, (list, tuple)):
        return type(vectors[0]) if vectors else None, vectors
    rest = iter(vectors)
    box = list(itertools.islice(rest, 1))
    return type(box[0]) if box else None, itertools.chain(_emptied(box), rest)


def _emptied(box: list[T]) -> Iterator[T]:
    while box:
        yield box.pop()
