"""What holds for every op of model scope, stated once."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops import aten, backends
from linlora.ops.transforms import refuse_transform


def check_constants(op: str, **tangents: Tensor | None) -> None:
    """Raise where a derivative is asked for that an op with a constant tangent does not give: a tangent that asks for a
    gradient (ValueError), a transform around the op (NotImplementedError)."""
    refuse_transform(op)
    for name, tangent in tangents.items():
        if tangent is not None and tangent.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} asks for a gradient, but at model scope a tangent is a constant to autograd; detach it, "
                "or build the layer of the ops in linlora.functional, which give the gradient of their tangents"
            )


def return_constant(ctx: Any, tangent: Tensor) -> None:
    """Let an output of a Function be a constant to autograd, for which its backward gets None, not zeros."""
    ctx.mark_non_differentiable(tangent)
    ctx.set_materialize_grads(False)


def backend_of(op: str, x: Tensor, *parameters: Tensor) -> ModuleType:
    """The backend that runs an op on these tensors: `torch` where one is empty, for there is nothing to launch."""
    device, empty = x.device, x.numel() == 0
    for parameter in parameters:
        empty = empty or parameter.numel() == 0
    if empty:
        return aten
    features = x.shape[-1] if x.dim() else 1
    outputs = parameters[0].shape[0] if op == "linear" else features
    return backends.select(device, op, (x.numel() // features, features, outputs), x.dtype)
