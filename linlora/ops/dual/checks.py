"""What holds for every op of model scope, stated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
