"""A fusion method in weight space as it acts on one layer, and the way through the layers that runs it.

    of vectors in memory            every layer at once
    of vectors that lie in files    a layer when it is asked for: the fused vector lies in files as its parts do

A method sees the ΔW of a layer as factors, of those adapters that change it, in an order of their values and not of the
list: the fused vector is the same, bit for bit, in whatever order the adapters come.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from linlora.task_vector import DifferentPointError, TaskVector
from linlora.tensor_files import StoredTensors, finite, memory
from linlora.weight_vector import Size, WeightVector, common_base, stored_factors, weight_vector
from linlora.weights import Update

Merge = Callable[[list[Update]], Update]
"""The ΔW of one layer, one or more, into one."""
T = TypeVar("T")


def fused_layers(vectors: Sequence[WeightVector], merge: Merge, weights: Sequence[float] | None = None) -> WeightVector:
    """The vector a method makes of vectors in weight space, each times its weight, layer by layer.

    The factors of the result have the sum of the ranks; where `merge` needs fewer, the others are zero. So sizes are
    known before a tensor is read.
    """
    weights = [1.0] * len(vectors) if weights is None else weights
    sizes: dict[str, Size] = {}
    for vector in vectors:
        for layer, size in vector.sizes().items():
            sizes[layer] = _beside(sizes.get(layer), size)
    sizes = {layer: sizes[layer] for layer in sorted(sizes)}

    def factors(layer: str) -> tuple[Tensor, Tensor]:
        parts = []
        for index, (vector, weight) in enumerate(zip(vectors, weights, strict=True)):
            if layer in vector.scalings:
                update = vector.update(layer)
                parts.append(Update(update.A, weight * update.B))
                if not finite(update.A) or not finite(parts[-1].B):
                    raise ValueError(f"fuse: layer '{layer}' of vector {index + 1} holds NaN or infinity")
        size = sizes[layer]
        made = merge(sorted(parts, key=_by_value))
        missing = size.rank - len(made.A)
        return pad(made.A, (0, 0, 0, missing)).to(size.dtype), pad(made.B, (0, missing)).to(size.dtype)

    stored = stored_factors(sizes, factors)
    deltas = stored if all(isinstance(vector.deltas, StoredTensors) for vector in vectors) else dict(stored)
    return weight_vector(vectors[0], deltas, dict.fromkeys(sizes, 1.0), common_base(*vectors))


def _beside(left: Size | None, right: Size) -> Size:
    """The size of the factors of two ΔW side by side, in float32 or wider."""
    rank, dtype = (0, torch.float32) if left is None else (left.rank, left.dtype)
    return right._replace(rank=rank + right.rank, dtype=torch.promote_types(dtype, right.dtype))


def _by_value(update: Update) -> tuple[int, ...]:
    """A key that tells two ΔW apart by their factors."""
    return len(update.A), *(zlib.crc32(memory(factor.contiguous())) for factor in (update.A, update.B))


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
