"""Fuses vectors of one point tensor by tensor: a `Rule` fuses one tensor, two drivers run it.

    in memory, or from a generator      for every vector: for every tensor      holds what the rule keeps of all tensors
    of vectors that lie in files        for every tensor: for every vector      holds what the rule keeps of one tensor

The second driver is lazy: each tensor of the fused vector is computed when it is asked for, so saving it streams
through the files.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from linlora.fusion.checks import checked
from linlora.fusion.layerwise import peek
from linlora.storage.tensors import StoredTensors, finite, shapes
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector

State = TypeVar("State")


class Rule(ABC, Generic[State]):
    """A method for one tensor: `zero`, then `add` for every vector in their order, then `result`."""

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

    Raises ValueError in weight space, where a vector's tensors are factors and no values of ΔW.
    """
    kind, vectors = peek(vectors)
    if kind is WeightVector:
        raise ValueError(
            f"{rule.method}: picks single values, and those of ΔW = s B A make a matrix of full rank, which no adapter "
            "holds; the values of A and B mean nothing by themselves. knots_ties is TIES in a basis of the "
            "adapters; linlora merge BASE A B --method ties picks values of ΔW, for a merged model"
        )
    if isinstance(vectors, (list, tuple)) and vectors and all(_stored(vector) for vector in vectors):
        return _by_tensor(vectors, rule)
    return _by_vector(vectors, rule)


def _stored(vector: Any) -> bool:
    return isinstance(vector, TaskVector) and isinstance(vector.deltas, StoredTensors)


def _by_vector(vectors: Iterable[TaskVector], rule: Rule[Any]) -> TaskVector:
    first: TaskVector | None = None
    states: dict[str, Any] = {}
    count = 0
    for vector in checked(vectors):
        if first is None:
            first = replace(vector, deltas=shapes(vector.deltas))
            states = {name: rule.zero(delta) for name, delta in first.deltas.items()}
        rule.look(count, vector)
        for name in states:
            rule.add(states[name], count, name, vector.deltas[name])
        count += 1
        del vector  # before the next one is loaded
    assert first is not None
    rule.close(count)
    rule.survey(states.values())
    deltas = {}
    for name, like in first.deltas.items():
        result = rule.result(states.pop(name))
        assert result is not None
        deltas[name] = _rounded(result, like, name)
    return replace(first, deltas=deltas)


def _by_tensor(vectors: Sequence[TaskVector], rule: Rule[Any]) -> TaskVector:
    for index, vector in enumerate(checked(vectors)):
        rule.look(index, vector)
    rule.close(len(vectors))
    like = shapes(vectors[0].deltas)

    def state(name: str) -> Any:
        made = rule.zero(like[name])
        for index, vector in enumerate(vectors):
            rule.add(made, index, name, vector.deltas[name])
        return made

    def read(name: str) -> Tensor:
        made = state(name)
        result = rule.result(made)
        if result is None:
            rule.survey(map(state, like))
            result = rule.result(made)
        assert result is not None
        return _rounded(result, like[name], name)

    return replace(vectors[0], deltas=StoredTensors(like, read))


def _rounded(result: Tensor, like: Tensor, name: str) -> Tensor:
    """A fused tensor in the dtype of the vectors."""
    rounded = result.to(like.dtype)
    if like.dtype == torch.float16 and finite(result) and not finite(rounded):  # the one that ends at 65504
        raise ValueError(f"fuse: '{name}' overflows in torch.float16; a smaller scaling is needed")
    return rounded


def mapped(vector: TaskVector, change: Callable[[str, Tensor], Tensor]) -> TaskVector:
    """The vector of changed tensors, each made when it is asked for."""
    deltas = vector.deltas
    return replace(vector, deltas=StoredTensors(shapes(deltas), lambda name: change(name, deltas[name])))


def zeros(like: Tensor) -> Tensor:
    """Zeros to accumulate in, on the CPU: float32, or the tensor's dtype where that is wider."""
    return torch.zeros(like.shape, dtype=wide(like))


def wide(*deltas: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32, or the widest of the tensors'."""
    return functools.reduce(torch.promote_types, (delta.dtype for delta in deltas), torch.float32)
