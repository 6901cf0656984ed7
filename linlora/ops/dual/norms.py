"""`layer_norm` and `rms_norm` on both streams.

    y = w ⊙ x̂ + b        y_t = w ⊙ J x_t        dx = J (w ⊙ g)        J = ∂x̂/∂x, a symmetric matrix

    layer norm   x̂ = (x − mean) rstd     J = rstd (I − 1 1ᵀ/N − x̂ x̂ᵀ/N)
    RMS norm     x̂ = x rstd              J = rstd (I − x̂ x̂ᵀ/N)

w and b are frozen. Kept for backward: x and a number or two a row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops.composed import backward_backend
from linlora.ops.dual.checks import backend_of, check_constants
from linlora.ops.rows import as_rows


def layer_norm(
    x: Tensor, x_tangent: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(y, y_tangent) of x and x_tangent (..., N), normalized over the last dimension; weight, bias (N,) or None."""
    check_constants("layer_norm", x_tangent=x_tangent)
    _check("layer_norm", x, x_tangent, weight)
    return _LayerNorm.apply(x, x_tangent, weight, bias, eps, backend_of("layer_norm", x))


def rms_norm(x: Tensor, x_tangent: Tensor, weight: Tensor | None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(y, y_tangent) of x and x_tangent (..., N): y = w ⊙ x / sqrt(mean(x²) + eps) over the last dimension."""
    check_constants("rms_norm", x_tangent=x_tangent)
    _check("rms_norm", x, x_tangent, weight)
    return _RMSNorm.apply(x, x_tangent, weight, eps, backend_of("rms_norm", x))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_tangent: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        rows = as_rows(x)
        y, y_tangent, mean, rstd = backend.layer_norm(rows, x_tangent.reshape(rows.shape), weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.backend = backend
        y, y_tangent = y.view(x.shape), y_tangent.view(x.shape)
        ctx.mark_non_differentiable(y_tangent)
        return y, y_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        backend = backward_backend("layer_norm", ctx.backend, g)
        dx = backend.layer_norm_backward(as_rows(g), as_rows(x), weight, mean, rstd)
        return dx.view(x.shape), None, None, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_tangent: Tensor, weight: Tensor | None, eps: float, backend: ModuleType
    ) -> tuple[Tensor, Tensor]:
        rows = as_rows(x)
        y, y_tangent, rstd = backend.rms_norm(rows, x_tangent.reshape(rows.shape), weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.backend = backend
        y, y_tangent = y.view(x.shape), y_tangent.view(x.shape)
        ctx.mark_non_differentiable(y_tangent)
        return y, y_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        backend = backward_backend("rms_norm", ctx.backend, g)
        dx = backend.rms_norm_backward(as_rows(g), as_rows(x), weight, rstd)
        return dx.view(x.shape), None, None, None, None


def _check(op: str, x: Tensor, x_tangent: Tensor, weight: Tensor | None) -> None:
    if x_tangent.shape != x.shape or x_tangent.dtype != x.dtype:
        raise ValueError(
            f"{op}: x_tangent is expected like x, {x.dtype} {tuple(x.shape)}, got {x_tangent.dtype} "
            f"{tuple(x_tangent.shape)}"
        )
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
