"""The adapters of every row of a batch: each entry of `adapter_names` as a weighted sum of adapters.

    "a"                      adapter a: the mixture {"a": 1.0}
    {"a": 0.6, "b": -0.2}    0.6 ΔW_a - 0.2 ΔW_b, in every layer that has them
    "__base__", {}           no adapter

A weight of 0 leaves its adapter out of the row, whatever the adapter holds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from linlora.kernels.uploads import upload
from linlora.layers.temporary import attributes
from linlora.ops.grouping import Groups

BASE = "__base__"
"""PEFT's name for no adapter."""

Mixture = tuple[tuple[str, float], ...]
"""Adapters in the order of their names, each with its weight, which is not 0."""


class Rows:
    """The mixtures of the rows of a batch.

    Attributes:
        distinct: those that occur. places: for every row, where in `distinct` its own is.
        named: every adapter that was named, also those with a weight of 0.
        may_be_lost: whether autograd may run a layer again without its rows (`linlora.layers.adapter_names`).

    >>> rows = Rows.of(["a", {"b": 2, "a": 0.5}, "__base__", {"a": 1.0, "b": 0.0}])
    >>> rows.distinct, rows.places
    (((), (('a', 0.5), ('b', 2.0)), (('a', 1.0),)), (2, 1, 0, 2))
    """

    def __init__(self, mixtures: Iterable[Mixture], named: Iterable[str] = ()) -> None:
        every = tuple(mixtures)
        self.named = frozenset(named).union(name for mixture in every for name, _ in mixture)
        self.distinct = tuple(sorted(set(every)))
        place_of = {mixture: place for place, mixture in enumerate(self.distinct)}
        self.places = tuple(place_of[mixture] for mixture in every)
        self.may_be_lost = torch.is_grad_enabled()
        self._groups: dict[tuple[int, torch.device, bool], Groups] = {}

    @classmethod
    def of(cls, names: Sequence[str | Mapping[str, float]] | Rows) -> Rows:
        """The rows that `adapter_names` asks for.

        Raises TypeError for what is no list of names and mappings, ValueError for weights that are not finite numbers.
        """
        if isinstance(names, Rows):
            return names
        if isinstance(names, str | Mapping) or not isinstance(names, Iterable):
            raise TypeError(
                f"Got adapter names of type {type(names)}, expected a list of str, or of mappings of str to weights."
            )
        entries = list(names)
        mixtures = [_mixture(row, entry) for row, entry in enumerate(entries)]
        return cls(mixtures, (name for entry in entries if isinstance(entry, Mapping) for name in entry))

    def __iter__(self) -> Iterator[Mixture]:
        return (self.distinct[place] for place in self.places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that some row has."""
        return tuple(sorted({name for mixture in self.distinct for name, _ in mixture}))

    @property
    def names(self) -> list[str] | None:
        """The rows as PEFT takes them, one name each; None where a row has several adapters, or a weight."""
        if any(len(mixture) > 1 or any(weight != 1.0 for _, weight in mixture) for mixture in self.distinct):
            return None
        return [mixture[0][0] if mixture else BASE for mixture in self]

    def repeated(self, times: int) -> Rows:
        """Every row several times in succession, as beam search repeats the examples."""
        return Rows(mixture for mixture in self for _ in range(times))

    def kept(self) -> AbstractContextManager[None]:
        """Say that layers which run inside the block find their rows when they run again."""
        return attributes(self, may_be_lost=False)

    def only(self, adapters: Collection[str]) -> list[Mixture]:
        """The distinct mixtures, of these adapters alone."""
        return [tuple(part for part in mixture if part[0] in adapters) for mixture in self.distinct]

    def weights_of(self, adapter: str) -> tuple[list[int], list[float]]:
        """The rows that have an adapter, and their weights of it."""
        found = {row: dict(mixture)[adapter] for row, mixture in enumerate(self) if adapter in dict(mixture)}
        return list(found), list(found.values())

    def groups(self, x: Tensor) -> Groups:
        """The rows of a layer's input (examples, ..., K) in groups, one for each distinct mixture.

        Layers of as many rows share them. Inference mode has its own, whose tensors autograd would refuse.
        """
        key = x.shape[:-1].numel(), x.device, torch.is_inference_mode_enabled()
        if key not in self._groups:
            self._groups[key] = Groups.of(upload(self.places, torch.int64, x.device), len(self.distinct), key[0])
        return self._groups[key]


def _mixture(row: int, entry: Any) -> Mixture:
    if isinstance(entry, str):
        return () if entry == BASE else ((entry, 1.0),)
    if not isinstance(entry, Mapping) or not all(isinstance(name, str) for name in entry):
        raise TypeError(f"adapter_names: row {row} is {entry!r}; a name is expected, or a mapping of names to weights")
    if BASE in entry:
        raise ValueError(f"adapter_names: row {row} weights '{BASE}', no adapter; {{}} is the base model alone")
    weights = {name: _number(row, name, weight) for name, weight in entry.items()}
    return tuple(sorted(item for item in weights.items() if item[1] != 0.0))


def _number(row: int, name: str, weight: Any) -> float:
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError(
            f"adapter_names: row {row}: the weight of '{name}' asks for a gradient, but weights here are numbers; "
            "learn them with linlora.routing.from_vectors(model, vectors), whose mixture= takes gradients"
        )
    if isinstance(weight, Tensor) and weight.dim() == 0:
        weight = weight.item()
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise ValueError(f"adapter_names: row {row}: the weight of '{name}' is {weight!r}; a finite number is expected")
    return float(weight)
