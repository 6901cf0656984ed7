"""A job: one provider's work on one case, ready to be checked, timed and weighed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import linlora

from .data import Data


class Job(Protocol):
    """What the gate, the clock and the scale ask of a job."""

    def context(self) -> ExitStack:
        """What is switched on around a run of steps and is not part of their time: the backend, the grad mode."""

    def step(self) -> Any:
        """The work that is timed."""

    def results(self) -> dict[str, Tensor]:
        """What the step computes, by the names of `linlora.bench.gate`."""

    def resident(self) -> Iterable[Tensor]:
        """What stays in memory between steps: parameters, buffers, inputs, optimizer state."""


class Layer(NamedTuple):
    """A provider's layer: inputs → outputs, with the parameters it trains ("A", "B") and every tensor it holds.

    `draws` is the same with a mask of dropout of its own, where `forward` is given the mask that everybody computes:
    what is timed, because every backend draws in its own way."""

    forward: Callable[..., Any]
    trainable: dict[str, Tensor]
    tensors: list[Tensor]
    draws: Callable[..., Any] | None = None


class LayerJob:
    """The forward, the forward and the backward, or the backward to the inputs alone, of one layer or op.

    Backward begins at as many outputs as there are cotangents: at both streams of a layer, at the primal of an op of
    model scope.
    """

    def __init__(
        self,
        layer: Layer,
        data: Data,
        phase: str,
        backend: str | None = None,
        compiled: bool = False,
    ) -> None:
        self.data, self.backend, self.differentiates = data, backend, phase != "forward"
        self.forward = torch.compile(layer.forward, dynamic=False) if compiled else layer.forward
        self._timed = layer.draws or self.forward
        self.tensors = layer.tensors
        self.leaves = dict(data.leaves)
        for name, parameter in layer.trainable.items():
            parameter.requires_grad_(phase != "input_gradient")
            if parameter.requires_grad:
                self.leaves[f"grad_{name}"] = parameter
        self._inputs, self._leaves = data.inputs, tuple(self.leaves.values())
        self._recorded: Any = None  # the outputs that every step differentiates
        if phase == "input_gradient":
            with self.context():
                self._recorded = self.forward(*self._inputs)

    def context(self) -> ExitStack:
        return switched(self.backend, grad=self.differentiates)

    def step(self) -> Any:
        if self._recorded is not None:
            return self._gradients(self._recorded)
        outputs = self._timed(*self._inputs)
        if not self.differentiates:
            return outputs
        return self._gradients(outputs)

    def results(self) -> dict[str, Tensor]:
        with self.context():
            outputs = self.forward(*self._inputs)
            named = dict(zip(("y", "y_tangent"), outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
            if self.differentiates:
                named.update(zip(self.leaves, self._gradients(outputs), strict=True))
        return {name: tensor.detach() for name, tensor in named.items()}

    def _gradients(self, outputs: Any) -> tuple[Tensor, ...]:
        cotangents = self.data.cotangents
        starts = outputs[: len(cotangents)] if isinstance(outputs, tuple) else outputs
        again = self._recorded is not None
        return torch.autograd.grad(starts, self._leaves, cotangents, retain_graph=again)

    def resident(self) -> Iterable[Tensor]:
        return [*self.tensors, *self.data.inputs, *(self.data.cotangents if self.differentiates else ())]


def switched(backend: str | None, grad: bool = True) -> ExitStack:
    """A context in which ops run on `backend` and autograd records, or not."""
    stack = ExitStack()
    stack.enter_context(torch.set_grad_enabled(grad))
    if backend is not None:
        stack.enter_context(linlora.use_backend(backend))  # type: ignore[arg-type]
    return stack
