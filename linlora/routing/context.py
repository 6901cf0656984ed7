"""Holds the routing of the batch that is running, for the layers of a routed model to read.

A routed model makes the `Routing` of a batch before its base model runs; it ends with the forward pass. Non-reentrant
activation checkpointing runs a part of the pass again, later: `Context.checkpoint_contexts` gives it the same routing.
"""

from __future__ import annotations

import math
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linlora.layers.temporary import attributes
from linlora.ops.grouping import Groups


class Factors(NamedTuple):
    """The mixed factors of one layer: A (T, K, r) (None where it has no effect) and B (T, r, N) of T groups."""

    A: Tensor | None
    B: Tensor


@dataclass(eq=False)
class Routing:
    """How the examples of a batch are routed.

    Attributes:
        places: the group of every example, (E,), or of every token, (E, length); one zero where all rows are a group.
        n_groups: T.
        factors: the factors of every group, by layer name.
        weights: for layers that mix by the example, not by the group: (E, Q, S), by layer name. A layer in neither
            asks its gate.
    """

    places: Tensor
    n_groups: int
    factors: dict[str, Factors]
    weights: dict[str, Tensor]
    _groups: dict[tuple[int, torch.device], Groups] = field(default_factory=dict, repr=False)

    def groups(self, lead: tuple[int, ...], device: torch.device) -> Groups:
        """The groups of a layer's rows, whose leading dimensions are `lead`; made once for each number of rows."""
        key = math.prod(lead), device
        if key not in self._groups:
            self._groups[key] = Groups(self.places.flatten().to(device), self.n_groups, key[0])
        return self._groups[key]


class Context(threading.local):
    """The state that a model and its layers share: the routing of the running batch, and whether adapters are off.

    Every thread has its own of both, so that threads may run batches through one model at the same time.
    """

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.disabled = False

    def __reduce__(self) -> tuple[type[Context], tuple]:
        return Context, ()  # a copy of the model runs nothing yet

    def running(self, routing: Routing | None) -> AbstractContextManager[None]:
        """Route the layers by `routing` inside the block."""
        return attributes(self, routing=routing)

    def off(self) -> AbstractContextManager[None]:
        """Run the frozen base layers alone inside the block."""
        return attributes(self, disabled=True)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The `context_fn` of torch.utils.checkpoint: a part is recomputed with the routing of its forward pass."""
        return nullcontext(), _Again(self)


class _Again:
    """Enters the routing of its making again, as often as a part is recomputed."""

    def __init__(self, context: Context) -> None:
        self.context, self.routing, self.disabled = context, context.routing, context.disabled
        self.outer: list[tuple[Any, bool]] = []

    def __enter__(self) -> None:
        self.outer.append((self.context.routing, self.context.disabled))
        self.context.routing, self.context.disabled = self.routing, self.disabled

    def __exit__(self, *_: Any) -> None:
        self.context.routing, self.context.disabled = self.outer.pop()
