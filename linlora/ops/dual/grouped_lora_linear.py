"""`grouped_lora_linear` of model scope: both streams of a routed layer, and the gradient of the whole linearization.

    forward    y    = x W ᵀ  + b + s u B0ᵀ              u = x' A0ᵀ
               y_t  = x_t Wᵀ + s [ c B0ᵀ + u B_t ]      c = x' A_t + x_t' A0ᵀ

    backward   dx   = g W + s ū A0                      ū = g B0
               dB_t = s uᵀ g      dA_t = s x'ᵀ ū        sums over the rows of group t

The primal is the layer at its point (A0, B0), the same for all rows; only the tangent knows of groups. As in
`lora_linear`, the offsets A_t and B_t receive what the primal's derivative with respect to them is. Where B0 = 0 the
primal is the frozen layer alone, and A_t has neither effect nor gradient.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.kernels.problem import LoraLinear
from linlora.ops.checks import autocast_input
from linlora.ops.composed import backward_backend
from linlora.ops.dual.checks import backend_of, check_constants
from linlora.ops.grouping import Groups
from linlora.ops.routing_checks import check_grouped_lora_linear
from linlora.ops.rows import as_rows


def grouped_lora_linear(
    x: Tensor,
    x_tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    groups: Groups,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, y_tangent), both (..., N); arguments as in `linlora.functional.grouped_lora_linear`, linearized.

    A (T, K, r) and B (T, r, N) receive the gradient of y; W, b, A0 and B0 are frozen. Raises ValueError for what does
    not fit.
    """
    check_constants("grouped_lora_linear", x_tangent=x_tangent)
    x = autocast_input(x)
    x_tangent = None if x_tangent is None else autocast_input(x_tangent)
    check_grouped_lora_linear(
        x, weight, bias, A, B, groups, A0, B0, x_tangent, dropout_p, seed
    )  # fmt: skip
    backend = backend_of("routed_lora_linear", x, weight, A0)
    return _GroupedLoraLinear.apply(
        x, x_tangent, weight, bias, A0, B0, None if B0 is None else A, B, groups, scaling, dropout_p, seed, backend
    )


class _GroupedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_tangent: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A0: Tensor,
        B0: Tensor | None,
        A: Tensor | None,
        B: Tensor,
        groups: Groups,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        rows, layout = as_rows(x), groups.layout(backend)
        rows_tangent = None if x_tangent is None else x_tangent.reshape(rows.shape)
        y, y_tangent, u = backend.dual_grouped_lora_linear(
            rows, rows_tangent, backend.place(rows, layout, dropout_p, seed),
            weight.to(x.dtype), bias if bias is None else bias.to(x.dtype),
            A0.t(), A, None if B0 is None else B0.t(), B, layout, scaling, dropout_p, seed,
        )  # fmt: skip
        A_needs, B_needs = ctx.needs_input_grad[6:8]
        ctx.save_for_backward(x if A_needs else None, weight, A0, B0, u if B_needs else None, seed)
        ctx.scaling, ctx.dropout_p, ctx.backend, ctx.groups, ctx.x_shape = scaling, dropout_p, backend, groups, x.shape
        ctx.factor_dtype = B.dtype
        shape = (*x.shape[:-1], weight.shape[0])
        y, y_tangent = y.view(shape), y_tangent.view(shape)
        ctx.mark_non_differentiable(y_tangent)
        return y, y_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        backend = backward_backend("grouped_lora_linear", ctx.backend, g)
        x, weight, A0, B0, u, seed = ctx.saved_tensors
        x_needs, (A_needs, B_needs) = ctx.needs_input_grad[0], ctx.needs_input_grad[6:8]
        layout, dropout = ctx.groups.layout(backend), (ctx.dropout_p, seed)
        g = as_rows(g)
        dx = u_adjoint = dA = dB = None
        if B0 is None:
            dx = g @ weight.to(g.dtype) if x_needs else None
        elif x_needs:
            point = LoraLinear(x, weight.to(g.dtype), None, A0, None, None, B0, ctx.scaling, None, *dropout)
            dx, _, u_adjoint, _ = backend.lora_linear(point.adjoint(g))
        elif A_needs:
            u_adjoint = g @ B0.to(g.dtype)
        if A_needs or B_needs:
            dB, dA = backend.grouped_gradients(
                u, backend.place(g, layout) if B_needs else None,
                u_adjoint if A_needs else None,
                backend.place(as_rows(x), layout, *dropout) if A_needs else None,
                layout, ctx.groups.n_groups, ctx.scaling, ctx.factor_dtype, *dropout,
            )  # fmt: skip
        return (
            None if dx is None else dx.view(ctx.x_shape), None, None, None, None, None,
            dA if A_needs else None, dB if B_needs else None, None, None, None, None, None,
        )  # fmt: skip
