"""Fuses vectors in weight space layer by layer: a method merges the ΔW of one layer, `fused_layers` runs it.

    of vectors in memory            every layer at once
    of vectors that lie in files    a layer when it is asked for: the fused vector lies in files as its parts do

A method sees the factors of the adapters that change a layer, sorted by their values: the order in which adapters are
given changes no bit of the fused vector.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from linlora.fusion.truncation import Cut, Factored, OutRank
from linlora.layers.weights import Update
from linlora.storage.ahead import Ahead
from linlora.storage.tensors import StoredTensors, finite, holding, memory, wide
from linlora.vectors.base_models import common_base
from linlora.vectors.factors import Size, stored_factors
from linlora.vectors.points import DifferentPointError
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector, weight_vector

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


Merge = Callable[[Layer], Update | Factored]
"""The ΔW of one layer, one or more, into one."""
Weights = Callable[[str], Sequence[float]]
"""What the ΔW of each vector is multiplied by in a layer."""


def fused_layers(
    vectors: Sequence[WeightVector],
    merge: Merge,
    out_rank: OutRank = "exact",
    energy: float | None = None,
    weights: Weights | None = None,
    most: float = math.inf,
) -> WeightVector:
    """The vector a method makes of vectors in weight space, each times its weight, layer by layer.

    Exactly, it has factors of the sum of the ranks, zeros where `merge` needs fewer, so that sizes are known before a
    tensor is read. Cut to a rank, or to an energy, the result is computed at once and held: one adapter of that rank.

    Args:
        out_rank, energy: see `Cut`.
        most: the largest rank that `merge` gives, where the sum of the ranks is larger.
    """
    cut = Cut(out_rank, energy)
    sizes = {
        name: size._replace(rank=int(min(size.rank, most)), dtype=wide(size.dtype))
        for name, size in fused_sizes(vectors).items()
    }

    def merged(name: str) -> Update | Factored:
        return merge(layer(vectors, name, weights))

    if cut.exact:

        def factors(name: str) -> tuple[Tensor, Tensor]:
            found = merged(name)
            return _padded(found.update() if isinstance(found, Factored) else found, sizes[name])

        return _of_layers(vectors, sizes, factors, dict.fromkeys(sizes, 1.0))

    def cut_factors(name: str) -> tuple[Tensor, Tensor, float, float]:
        found = merged(name)
        values, factored = (found if isinstance(found, Factored) else Factored.of(found)).by_size()
        rank, squares = cut.rank(values), cut.significant(values).square()
        A, B = _padded(factored.update(rank), sizes[name]._replace(rank=rank))
        return A, B, float(squares[rank:].sum()), float(squares.sum())

    deltas: dict[str, Tensor] = {}
    lost = whole = 0.0
    of_layer = Ahead(sizes, cut_factors)
    for name in sizes:
        deltas[f"{name}.dA"], deltas[f"{name}.dB"], *squares = of_layer(name)
        lost, whole = lost + squares[0], whole + squares[1]
    fused = weight_vector(vectors[0], deltas, dict.fromkeys(sizes, 1.0), _base(vectors))
    return replace(fused, truncation_error=(lost / whole) ** 0.5 if whole else 0.0)


def summed(
    vectors: Sequence[WeightVector], weights: Weights, out_rank: OutRank = "exact", energy: float | None = None
) -> WeightVector:
    """Σ λᵢ ΔWᵢ, the factors of all side by side, or cut.

    Where all adapters of a layer have one λ s, up to its sign, that is the scaling of the layer in the sum, and the
    factors stay as they are, in their own dtype. Elsewhere they are scaled, in float32 or wider.
    """
    if not Cut(out_rank, energy).exact:
        return fused_layers(vectors, side_by_side, out_rank, energy, weights)
    sizes = fused_sizes(vectors)
    scalings: dict[str, float] = {}
    for name, size in sizes.items():
        both = zip(vectors, weights(name), strict=True)
        each = {abs(weight * vector.scalings[name]) for vector, weight in both if name in vector.scalings}
        if len(each) == 1 and math.isfinite(min(each)) and size.dtype.itemsize > 1:  # float8 has no negative
            scalings[name] = min(each)
    sizes = {n: size if n in scalings else size._replace(dtype=wide(size.dtype)) for n, size in sizes.items()}

    def factors(name: str) -> tuple[Tensor, Tensor]:
        stored_as = sizes[name].dtype if name in scalings else None
        return _padded(side_by_side(layer(vectors, name, weights, stored_as)), sizes[name])

    return _of_layers(vectors, sizes, factors, {name: scalings.get(name, 1.0) for name in sizes})


def side_by_side(of: Layer) -> Update:
    """Σ ΔW as one product of the factors of all."""
    return Update(torch.cat([update.A for update in of.updates]), torch.cat([update.B for update in of.updates], dim=1))


def layer(
    vectors: Sequence[WeightVector], name: str, weights: Weights | None = None, stored_as: torch.dtype | None = None
) -> Layer:
    """The ΔW of a layer, in an order of its values. Raises ValueError where one is not finite.

    Args:
        stored_as: a dtype that holds all factors, to leave their values as they are, but for the sign of weight and
            scaling.
    """
    indices = [index for index, vector in enumerate(vectors) if name in vector.scalings]
    of_each = weights(name) if weights else [1.0] * len(vectors)
    updates = []
    for index in indices:
        vector, weight = vectors[index], of_each[index]
        if stored_as is not None:
            A, B = (vector.deltas[f"{name}.{kind}"].to(stored_as) for kind in ("dA", "dB"))
            update = Update(A, -B if weight * vector.scalings[name] < 0.0 else B)
        else:
            update = vector.update(name, weight)
        if not finite(update.A) or not finite(update.B):
            raise ValueError(f"fuse: layer '{name}' of vector {index + 1} holds NaN or infinity")
        updates.append(update)
    order = order_of_values(updates)
    return Layer(name, [indices[i] for i in order], [updates[i] for i in order])


def fused_sizes(vectors: Sequence[WeightVector]) -> dict[str, Size]:
    """The sizes of the factors of all vectors side by side, in a dtype that holds those of all."""
    sizes: dict[str, Size] = {}
    for vector in vectors:
        for name, size in vector.sizes().items():
            there = sizes.get(name, size._replace(rank=0))
            dtype = holding(there.dtype, size.dtype)
            sizes[name] = size._replace(rank=there.rank + size.rank, dtype=dtype)
    return {name: sizes[name] for name in sorted(sizes)}


def _of_layers(
    vectors: Sequence[WeightVector],
    sizes: Mapping[str, Size],
    factors: Callable[[str], tuple[Tensor, Tensor]],
    scalings: Mapping[str, float],
) -> WeightVector:
    """The fused vector: in files where all vectors are, else in memory."""
    stored = stored_factors(sizes, factors)
    deltas = stored if all(isinstance(vector.deltas, StoredTensors) for vector in vectors) else dict(stored)
    return weight_vector(vectors[0], deltas, scalings, _base(vectors))


def _base(vectors: Sequence[WeightVector]) -> str | None:
    return common_base(*(vector.base_model for vector in vectors))


def _padded(update: Update, size: Size) -> tuple[Tensor, Tensor]:
    """A and B of a size, filled up with zeros."""
    missing = size.rank - len(update.A)
    A, B = update.A.to(size.dtype), update.B.to(size.dtype)
    if missing:
        A, B = pad(A, (0, 0, 0, missing)), pad(B, (0, missing))
    return A.contiguous(), B.contiguous()


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
