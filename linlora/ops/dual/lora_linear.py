"""`lora_linear` of model scope: both streams of a LoRA layer, and the gradient of the whole network's linearization.

    forward    y    = x W ᵀ  + b + s u B0ᵀ              u = x' A0ᵀ
               y_t  = x_t Wᵀ + s [ c B0ᵀ + u dBᵀ ]      c = x' dAᵀ + x_t' A0ᵀ

    backward   dx   = g W + s ū A0                      ū = g B0
               d dB = s gᵀ u      d dA = s ūᵀ x'        the gradients plain LoRA has at (A0, B0)

y is a function of (A0 + dA, B0 + dB) evaluated at dA = dB = 0: its derivatives there are what dA and dB receive.
Where B0 = 0 the primal is the frozen layer alone, and dA has neither effect nor gradient.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops import aten, backends
from linlora.ops.checks import autocast_input, check_lora_linear
from linlora.ops.composed import backward_backend
from linlora.ops.dual.checks import check_constants
from linlora.ops.rows import as_rows


def lora_linear(
    x: Tensor,
    x_tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, y_tangent), both (..., N); arguments as in `linlora.functional.lora_linear`.

    dA and dB receive the gradient of y; W, b, A0 and B0 are frozen. Raises ValueError for what does not fit.
    """
    check_constants("lora_linear", x_tangent=x_tangent)
    x = autocast_input(x)
    x_tangent = None if x_tangent is None else autocast_input(x_tangent)
    check_lora_linear("lora_linear", x, weight, bias, A0, B0, dA, dB, x_tangent, dropout_p, seed)
    backend = backends.select_layer("lora_linear", x, weight, A0.shape[0], dropout_p)
    if any(tensor.numel() == 0 for tensor in (x, weight, A0)):
        backend = aten
    return _LoraLinear.apply(
        x, x_tangent, weight, bias, A0, B0, None if B0 is None else dA, dB, scaling, dropout_p, seed, backend
    )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_tangent: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A0: Tensor,
        B0: Tensor | None,
        dA: Tensor | None,
        dB: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        rows = as_rows(x)
        rows_tangent = None if x_tangent is None else x_tangent.reshape(rows.shape)
        weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
        y, y_tangent, u, _ = backend.lora_linear(
            rows, rows_tangent, weight, bias, A0, dA, B0, dB, scaling, dropout_p, seed
        )
        _, _, _, _, _, _, dA_needs, dB_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if dA_needs else None, weight, A0, B0, u if dB_needs else None, seed)
        ctx.scaling, ctx.dropout_p, ctx.backend, ctx.x_shape = scaling, dropout_p, backend, x.shape
        ctx.factor_dtype = dB.dtype
        shape = (*x.shape[:-1], weight.shape[0])
        y, y_tangent = y.view(shape), y_tangent.view(shape)
        ctx.mark_non_differentiable(y_tangent)
        return y, y_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        backend = backward_backend("lora_linear", ctx.backend, g)
        x, weight, A0, B0, u, seed = ctx.saved_tensors
        x_needs, _, _, _, _, _, dA_needs, dB_needs, *_ = ctx.needs_input_grad
        g, dropout = as_rows(g), (ctx.dropout_p, seed)
        dx = u_adjoint = None
        if B0 is None:
            dx = g @ weight if x_needs else None
        elif x_needs:
            dx, u_adjoint, _ = backend.linearized_lora_linear(
                g, weight.t(), None, B0.t(), None, None, A0.t(), ctx.scaling, *dropout, adjoint=True
            )
        elif dA_needs:
            u_adjoint = g @ B0.to(g.dtype)
        d_dB, d_dA = backend.factor_gradients(
            u, g if dB_needs else None,
            u_adjoint if dA_needs else None, as_rows(x) if dA_needs else None,
            ctx.scaling, ctx.factor_dtype, *dropout,
        ) if dA_needs or dB_needs else (None, None)  # fmt: skip
        return (
            None if dx is None else dx.view(ctx.x_shape), None, None, None, None, None,
            d_dA if dA_needs else None, d_dB if dB_needs else None, None, None, None, None,
        )  # fmt: skip
