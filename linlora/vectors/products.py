"""Products with the Jacobian J of a whole network at its linearization point φ0, in the adapter parameters.

`jvp` is one dual forward pass, `vjp` one ordinary forward and backward pass. Both are at φ0, wherever the adapter of
the model is now, and in eval mode, where the network is a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from linlora.layers.temporary import displaced, evaluating, trainable
from linlora.stream import DualTensor, Stream
from linlora.vectors.adapters import delta_parameters
from linlora.vectors.task_vector import TaskVector


def jvp(model: PeftModel, vector: TaskVector, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(f(φ0), J δ): the main output of the network at its linearization point, and its tangent along a vector.

    Args:
        model: linearized at scope "model".
        vector: δ, a TaskVector of scope "model" at the model's point.
        inputs: the arguments of the model, without labels; the main output is `model(**inputs)[0]`.

    Raises ValueError for a model of another scope or inputs with labels, DifferentPointError for a foreign vector.

    >>> import linlora
    >>> model, batch = linlora.testing.tiny_model("bert"), linlora.testing.tiny_batch("bert")
    >>> _ = linlora.linearize(model, scope="model")
    >>> logits, tangent = jvp(model, linlora.TaskVector.from_model(model), batch)
    >>> logits.shape, tangent.any().item()
    (torch.Size([3, 3]), False)
    """
    current = TaskVector.from_model(model)
    vector.check_same_point(replace(current, base_model=None))
    parameters = delta_parameters(model)
    with at_point(model) as stream, displaced(parameters, vector.deltas), torch.no_grad(), stream.returning("both"):
        return both_outputs(model, inputs)


def vjp(model: PeftModel, inputs: Mapping[str, Any]) -> tuple[Tensor, Callable[[Tensor], TaskVector]]:
    """(f(φ0), pullback) with pullback(g) = Jᵀ g, a TaskVector, for a cotangent g shaped like the output.

    The pullback may be called many times; it keeps the graph of its forward pass. Arguments and errors are `jvp`'s.

    >>> import linlora
    >>> model, batch = linlora.testing.tiny_model("bert"), linlora.testing.tiny_batch("bert")
    >>> _ = linlora.linearize(model, scope="model")
    >>> logits, pullback = vjp(model, batch)
    >>> pullback(torch.ones_like(logits)).norm() > 0
    True
    """
    origin = 0.0 * TaskVector.from_model(model)
    parameters = delta_parameters(model)
    with at_point(model) as stream, trainable(parameters), torch.enable_grad(), stream.returning("primal"):
        output = main_output(model, inputs)

    def pullback(g: Tensor) -> TaskVector:
        with trainable(parameters):
            gradients = torch.autograd.grad(
                output, list(parameters.values()), g, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        deltas = {name: gradient.cpu() for name, gradient in zip(parameters, gradients, strict=True)}
        return replace(origin, deltas=deltas)

    return output.detach(), pullback


def both_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Primal and tangent of the main output, inside `Stream.returning("both")`."""
    output = main_output(model, inputs)
    if isinstance(output, DualTensor):
        return output.primal, output.tangent
    return output, torch.zeros_like(output)


def main_output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    if "labels" in inputs:
        raise ValueError("the products are of the network's output, not of its loss: leave 'labels' out of the inputs")
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def at_point(model: nn.Module) -> Iterator[Stream]:
    """The stream of a model of scope "model", which is in eval mode inside the block."""
    streams = {id(s): s for module in model.modules() if isinstance(s := vars(module).get("stream"), Stream)}
    if not streams:
        raise ValueError("the model is not linearized at model scope: call linlora.linearize(model, scope='model')")
    with evaluating(model):
        yield next(iter(streams.values()))
