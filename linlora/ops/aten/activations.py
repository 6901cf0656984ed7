"""Activations on both streams: y = act(x) and y_t = act'(x) x_t; gated, y = act(gate) ⊙ up.

An elementwise Jacobian is diagonal, hence symmetric: aten's backward of an activation, given the tangent in place of
the cotangent, *is* its tangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["gelu", "gelu_tanh", "silu", "relu"]

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
}
JACOBIAN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_tanh": lambda v, x: torch.ops.aten.gelu_backward.default(v, x, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward.default,
    "relu": lambda v, x: torch.ops.aten.threshold_backward.default(v, x, 0),
}


def activation(x: Tensor, x_tangent: Tensor | None, kind: Kind) -> tuple[Tensor, Tensor]:
    """(act(x), act'(x) x_t), shaped like x; without `x_tangent` the second is empty."""
    y = _FORWARD[kind](x)
    return y, y.new_empty(0) if x_tangent is None else JACOBIAN[kind](x_tangent, x)


def activation_backward(g: Tensor, x: Tensor, kind: Kind) -> Tensor:
    """act'(x) g."""
    return JACOBIAN[kind](g, x)


def gated_activation(
    gate: Tensor, gate_tangent: Tensor | None, up: Tensor, up_tangent: Tensor | None, kind: Kind
) -> tuple[Tensor, Tensor]:
    """y = act(gate) ⊙ up and y_t = act'(gate) gate_t ⊙ up + act(gate) ⊙ up_t."""
    opened = _FORWARD[kind](gate)
    y = opened * up
    y_tangent = None if gate_tangent is None else JACOBIAN[kind](gate_tangent, gate).mul_(up)
    if up_tangent is not None:
        through = opened.mul_(up_tangent)
        y_tangent = through if y_tangent is None else y_tangent.add_(through)
    return y, y.new_empty(0) if y_tangent is None else y_tangent


def gated_activation_backward(g: Tensor, gate: Tensor, up: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(d gate, d up) = (act'(gate) (g ⊙ up), g ⊙ act(gate))."""
    return JACOBIAN[kind](g * up, gate), g * _FORWARD[kind](gate)
