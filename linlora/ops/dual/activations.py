"""`activation` and `gated_activation` (SwiGLU, GeGLU) on both streams.

    y = act(x)             y_t = act'(x) x_t                                       dx = act'(x) g
    y = act(gate) ⊙ up     y_t = act'(gate) gate_t ⊙ up + act(gate) ⊙ up_t
                           d gate = act'(gate) (g ⊙ up)       d up = act(gate) ⊙ g

act is "gelu" (by erf), "gelu_tanh", "silu" or "relu". Kept for backward: the inputs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops.aten.activations import Kind
from linlora.ops.backends import select_op
from linlora.ops.composed import backward_backend
from linlora.ops.dual.checks import check_constants, return_constant


def activation(x: Tensor, x_tangent: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(act(x), act'(x) x_tangent), shaped like x."""
    check_constants("activation", x_tangent=x_tangent)
    _check_like("activation", x, "x_tangent", x_tangent)
    return _Activation.apply(x, x_tangent, kind, select_op("activation", x))


def gated_activation(
    gate: Tensor, gate_tangent: Tensor | None, up: Tensor, up_tangent: Tensor | None, kind: Kind
) -> tuple[Tensor, Tensor]:
    """(act(gate) ⊙ up, its tangent), shaped like gate; at least one tangent is given."""
    check_constants("gated_activation", gate_tangent=gate_tangent, up_tangent=up_tangent)
    _check_like("gated_activation", gate, "up", up)
    backend = select_op("gated_activation", gate)
    return _GatedActivation.apply(gate, gate_tangent, up, up_tangent, kind, backend)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x_tangent: Tensor, kind: Kind, backend: ModuleType) -> tuple[Tensor, Tensor]:
        y, y_tangent = backend.activation(x, x_tangent, kind)
        ctx.save_for_backward(x)
        ctx.kind, ctx.backend = kind, backend
        return_constant(ctx, y_tangent)
        return y, y_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None
        backend = backward_backend("activation", ctx.backend, g)
        return backend.activation_backward(g, *ctx.saved_tensors, ctx.kind), None, None, None


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        gate_tangent: Tensor | None,
        up: Tensor,
        up_tangent: Tensor | None,
        kind: Kind,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        y, y_tangent = backend.gated_activation(gate, gate_tangent, up, up_tangent, kind)
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.backend = kind, backend
        return_constant(ctx, y_tangent)
        return y, y_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None, None, None, None
        backend = backward_backend("gated_activation", ctx.backend, g)
        d_gate, d_up = backend.gated_activation_backward(g, *ctx.saved_tensors, ctx.kind)
        return d_gate, None, d_up, None, None, None


def _check_like(op: str, x: Tensor, name: str, other: Tensor) -> None:
    if other.shape != x.shape or other.dtype != x.dtype:
        raise ValueError(
            f"{op}: {name} is expected to be {x.dtype} {tuple(x.shape)}, got {other.dtype} {tuple(other.shape)}"
        )
