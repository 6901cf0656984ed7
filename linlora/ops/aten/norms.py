"""Layer norm and RMS norm on both streams.

With x̂ = (x − mean) rstd (for RMS norm without the mean), y = w ⊙ x̂ + b and the Jacobian of x ↦ x̂ is symmetric:

    layer norm  J = rstd (I − 1 1ᵀ/N − x̂ x̂ᵀ/N)          RMS norm  J = rstd (I − x̂ x̂ᵀ/N)

so one function serves both directions: y_t = w ⊙ J x_t forward, dx = J (w ⊙ g) backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linlora.kernels.norm_problem import Norm, NormResult


def norm(problem: Norm) -> NormResult:
    """Both streams of a matrix x (M, N), with mean and rstd as backward wants them."""
    x, x_tangent, weight, bias, eps, centered = problem
    if centered:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], _like(weight, x), _like(bias, x), eps)
        y_tangent = None if x_tangent is None else _layer_jacobian(x_tangent, x, None, mean, rstd)
        if y_tangent is not None and weight is not None:
            y_tangent.mul_(weight)
        return NormResult(y, y_tangent, mean, rstd)
    wide = _wide(x)
    rstd = torch.linalg.vector_norm(wide, dim=-1).square_().div_(max(x.shape[-1], 1)).add_(eps).rsqrt_()
    normalized = wide * rstd.unsqueeze(-1)
    change = None if x_tangent is None else _rms_jacobian(_wide(x_tangent), normalized, rstd)
    y_tangent = None if change is None else _scaled(change, weight, x.dtype)
    return NormResult(_scaled(normalized, weight, x.dtype), y_tangent, None, rstd)


def norm_backward(problem: Norm, g: Tensor, result: NormResult) -> Tensor:
    """dx = J (w ⊙ g)."""
    x, weight, rstd = problem.x, problem.weight, result.rstd
    if problem.centered:
        return _layer_jacobian(g, x, weight, result.mean, rstd)
    g = _wide(g) if weight is None else _wide(g) * weight
    return _rms_jacobian(g, _wide(x) * rstd.unsqueeze(-1), rstd).to(x.dtype)


def _layer_jacobian(v: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """J (w ⊙ v) of the layer norm."""
    change, _, _ = torch.ops.aten.native_layer_norm_backward.default(
        v, x, x.shape[-1:], mean, rstd, _like(weight, x), None, [True, False, False]
    )
    return change


def _rms_jacobian(v: Tensor, normalized: Tensor, rstd: Tensor) -> Tensor:
    """rstd (v − x̂ mean(x̂ ⊙ v))."""
    projection = torch.linalg.vecdot(v, normalized).unsqueeze(-1).div_(max(v.shape[-1], 1))
    return torch.addcmul(v, normalized, projection, value=-1.0).mul_(rstd.unsqueeze(-1))


def _scaled(wide: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (wide if weight is None else wide * weight).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _like(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return parameter if parameter is None else parameter.to(x.dtype)
