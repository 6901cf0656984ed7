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

from linlora.kernels.norm_problem import Norm, NormResult
from linlora.ops.backends import select_op
from linlora.ops.composed import backward_backend
from linlora.ops.dual.checks import check_constants, return_constant
from linlora.ops.rows import as_rows, of_rows


def layer_norm(
    x: Tensor, x_tangent: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(y, y_tangent) of x and x_tangent (..., N), normalized over the last dimension; weight, bias (N,) or None."""
    return _run(Norm(x, x_tangent, weight, bias, eps, centered=True))


def rms_norm(x: Tensor, x_tangent: Tensor, weight: Tensor | None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(y, y_tangent) of x and x_tangent (..., N): y = w ⊙ x / sqrt(mean(x²) + eps) over the last dimension."""
    return _run(Norm(x, x_tangent, weight, None, eps, centered=False))


def _run(problem: Norm) -> tuple[Tensor, Tensor]:
    check_constants(problem.op, x_tangent=problem.x_tangent)
    _check(problem.op, problem.x, problem.x_tangent, problem.weight)
    return _Norm.apply(select_op(problem.op, problem.x), *problem)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: ModuleType, *fields: Any) -> tuple[Tensor, Tensor]:
        x, x_tangent, weight, *_ = fields
        result = backend.norm(Norm(as_rows(x), as_rows(x_tangent), *fields[2:]))
        ctx.save_for_backward(x, weight, result.mean, result.rstd)
        ctx.backend, ctx.numbers = backend, fields[4:]
        y, y_tangent = of_rows(result.y, x), of_rows(result.y_tangent, x)
        return_constant(ctx, y_tangent)
        return y, y_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Any, ...]:
        if g is None:
            return (None,) * 7
        x, weight, mean, rstd = ctx.saved_tensors
        problem = Norm(as_rows(x), None, weight, None, *ctx.numbers)
        backend = backward_backend(problem.op, ctx.backend, g)
        dx = backend.norm_backward(problem, as_rows(g), NormResult(None, None, mean, rstd))
        return None, of_rows(dx, x), *(None,) * 5


def _check(op: str, x: Tensor, x_tangent: Any, weight: Tensor | None) -> None:
    if x_tangent.shape != x.shape or x_tangent.dtype != x.dtype:
        raise ValueError(
            f"{op}: x_tangent is expected like x, {x.dtype} {tuple(x.shape)}, got {x_tangent.dtype} "
            f"{tuple(x_tangent.shape)}"
        )
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
