"""Fuses vectors of one point tensor by tensor: a `Rule` fuses one tensor, two drivers run it.

    in memory, or from a generator      for every vector: for every tensor      holds what the rule keeps of all tensors
    of vectors that lie in files        for every tensor: for every vector      holds what the rule keeps of one tensor

The second driver is lazy: each tensor of the fused vector is computed when it is asked for, so saving it streams
through the files.
"""

from __future__ import annotations

import itertools
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from linlora.fusion.checks import checked
from linlora.fusion.layerwise import peek
from linlora.storage.tensors import StoredTensors, holding, memory, shapes, wide
from linlora.vectors.base_models import common_base
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector

State = TypeVar("State")


class Rule(ABC, Generic[State]):
    """A method for one tensor: `zero`, then `add` for every vector, then `result`.

    `index` is the place of a vector as it was given; the order in which vectors are added is not that of the list.
    """

    method: str

    def look(self, index: int, vector: TaskVector) -> None:
        """See a vector as a whole, before its tensors are added."""

    def close(self, count: int) -> None:
        """All vectors have been looked at; so many."""

    @abstractmethod
    def zero(self, like: Tensor) -> State:
        """The state of a tensor before anything is added."""

    @abstractmethod
    def add(self, state: State, index: int, name: str, delta: Tensor) -> None:
        """Add the tensor of a vector, in place."""

    @abstractmethod
    def result(self, state: State) -> Tensor | None:
        """The fused tensor; None if the rule has to see the states of all tensors first, by `survey`."""

    def survey(self, states: Iterable[State]) -> None:
        """See the states of all tensors, everything added."""


def fused(vectors: Iterable[TaskVector], rule: Rule[Any]) -> TaskVector:
    """The vector a rule makes of vectors that add; lazily, if they are in a list or tuple and lie in files.

    Those of a list are added in an order of their values, so that their own order changes no bit.

    Raises ValueError in weight space, where a vector's tensors are factors and no values of ΔW.
    """
    kind, vectors = peek(vectors)
    if kind is WeightVector:
        raise ValueError(
            f"{rule.method}: picks single values, and those of ΔW = s B A make a matrix of full rank, which no adapter "
            "holds; the values of A and B mean nothing by themselves. knots_ties is TIES in a basis of the "
            "adapters; linlora merge BASE A B --method ties picks values of ΔW, for a merged model"
        )
    if not isinstance(vectors, (list, tuple)):
        return _by_vector(checked(vectors), itertools.count(), rule)
    vectors = list(checked(vectors))
    order, like = order_of_values(vectors), without_values(vectors)
    if all(isinstance(vector.deltas, StoredTensors) for vector in vectors):
        return _by_tensor(vectors, order, rule, like)
    return _by_vector((vectors[index] for index in order), order, rule, like)


def _by_vector(
    vectors: Iterable[TaskVector], indices: Iterable[int], rule: Rule[Any], like: TaskVector | None = None
) -> TaskVector:
    states: dict[str, Any] = {}
    count, places = 0, iter(indices)
    for vector in vectors:
        index, before, like = next(places), like or vector, without_values([like or vector, vector])
        states = states or {name: rule.zero(delta) for name, delta in like.deltas.items()}
        rule.look(index, vector)
        for name, state in states.items():
            if wide(like.deltas[name].dtype) != wide(before.deltas[name].dtype):
                raise ValueError(
                    f"fuse: '{name}' of vector {index + 1} is {like.deltas[name].dtype}, wider than the sum of those "
                    "before it; pass the vectors in a list"
                )
            rule.add(state, index, name, vector.deltas[name])
        count += 1
        del vector, before  # before the next one is loaded
    assert like is not None
    rule.close(count)
    rule.survey(states.values())
    deltas = {}
    for name in like.deltas:
        result = rule.result(states.pop(name))
        assert result is not None
        deltas[name] = rounded(result, like.deltas[name].dtype, name)
    return replace(like, deltas=deltas)


def _by_tensor(vectors: Sequence[TaskVector], order: Sequence[int], rule: Rule[Any], like: TaskVector) -> TaskVector:
    for index in order:
        rule.look(index, vectors[index])
    rule.close(len(vectors))

    def state(name: str) -> Any:
        made = rule.zero(like.deltas[name])
        for index in order:
            rule.add(made, index, name, vectors[index].deltas[name])
        return made

    def read(name: str) -> Tensor:
        made = state(name)
        result = rule.result(made)
        if result is None:
            rule.survey(map(state, like.deltas))
            result = rule.result(made)
        assert result is not None
        return rounded(result, like.deltas[name].dtype, name)

    return replace(like, deltas=StoredTensors(like.deltas, read))


def without_values(vectors: Sequence[TaskVector]) -> TaskVector:
    """The vector that some add up to, without values: in dtypes that hold those of all, of the base model they name."""
    at = next((vector for vector in vectors if vector.point is not None), vectors[0])  # not the hash alone
    like = [shapes(vector.deltas) for vector in vectors]
    dtypes = {name: holding(*(deltas[name].dtype for deltas in like)) for name in like[0]}
    deltas = {name: torch.empty(like[0][name].shape, dtype=dtype, device="meta") for name, dtype in dtypes.items()}
    return replace(at, deltas=deltas, base_model=common_base(*(vector.base_model for vector in vectors)))


def order_of_values(vectors: Sequence[TaskVector]) -> list[int]:
    """The places of vectors in an order that is a function of their values alone.

    >>> u, v = (TaskVector({"q.dB": torch.tensor(x)}, None, "", {"q": 1.0}, "layer") for x in ([1.0, 2.0], [3.0, -2.0]))
    >>> order_of_values([u, v]) == order_of_values([v, u])[::-1]
    True
    """
    keys: list[tuple[int, ...]] = [()] * len(vectors)
    for name in sorted(vectors[0].deltas):
        if len(set(keys)) == len(keys):
            break  # a few tensors tell them apart
        values = (memory(vector.deltas[name].contiguous()) for vector in vectors)
        keys = [(*key, zlib.crc32(of_vector)) for key, of_vector in zip(keys, values, strict=True)]
    return sorted(range(len(vectors)), key=keys.__getitem__)


def rounded(result: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A fused tensor in the dtype of the vectors. Raises ValueError where that does not hold it."""
    if result.numel():
        largest = max(abs(float(extreme)) for extreme in torch.aminmax(result.detach()))
        if not math.isfinite(largest):
            raise ValueError(
                f"fuse: '{name}' is not finite: a vector holds NaN or infinity there, or the sum overflows"
            )
        if largest > torch.finfo(dtype).max:
            raise ValueError(f"fuse: '{name}' overflows in {dtype}; a smaller scaling is needed")
    return result.to(dtype)


def mapped(vector: TaskVector, change: Callable[[str, Tensor], Tensor]) -> TaskVector:
    """The vector of changed tensors, each made when it is asked for."""
    deltas = vector.deltas
    return replace(vector, deltas=StoredTensors(shapes(deltas), lambda name: change(name, deltas[name])))
