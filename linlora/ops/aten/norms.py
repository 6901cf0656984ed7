"""Layer norm and RMS norm on both streams.

With x̂ = (x − mean) rstd (for RMS norm without the mean), y = w ⊙ x̂ + b and the Jacobian of x ↦ x̂ is symmetric:

    layer norm  J = rstd (I − 1 1ᵀ/N − x̂ x̂ᵀ/N)          RMS norm  J = rstd (I − x̂ x̂ᵀ/N)

so one function serves both directions: y_t = w ⊙ J x_t forward, dx = J (w ⊙ g) backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(
    x: Tensor, x_tangent: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, y_t, mean, rstd) of a matrix x (M, N); mean and rstd (M,) as backward wants them."""
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], _like(weight, x), _like(bias, x), eps)
    if x_tangent is None:
        return y, y.new_empty(0), mean, rstd
    y_tangent = layer_norm_backward(x_tangent, x, None, mean, rstd)
    return y, y_tangent if weight is None else y_tangent.mul_(weight), mean, rstd


def layer_norm_backward(g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """dx = J (w ⊙ g)."""
    dx, _, _ = torch.ops.aten.native_layer_norm_backward.default(
        g, x, x.shape[-1:], mean, rstd, _like(weight, x), None, [True, False, False]
    )
    return dx


def rms_norm(x: Tensor, x_tangent: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, y_t, rstd) of a matrix x (M, N), rstd = (mean(x²) + eps)^-½ of shape (M,)."""
    wide = _wide(x)
    rstd = torch.linalg.vector_norm(wide, dim=-1).square_().div_(max(x.shape[-1], 1)).add_(eps).rsqrt_()
    normalized = wide * rstd.unsqueeze(-1)
    if x_tangent is None:
        y_tangent = x.new_empty(0)
    else:
        y_tangent = _scaled(_rms_jacobian(_wide(x_tangent), normalized, rstd), weight, x.dtype)
    return _scaled(normalized, weight, x.dtype), y_tangent, rstd


def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    """dx = J (w ⊙ g)."""
    g = _wide(g) if weight is None else _wide(g) * weight
    return _rms_jacobian(g, _wide(x) * rstd.unsqueeze(-1), rstd).to(x.dtype)


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
