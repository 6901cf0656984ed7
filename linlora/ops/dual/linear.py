"""`linear` on both streams, a frozen layer: y = x Wᵀ + b, y_t = x_t Wᵀ with one reading of W; dx = g W."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops.backends import select_op
from linlora.ops.checks import autocast_input
from linlora.ops.dual.checks import check_constants, return_constant
from linlora.ops.rows import as_rows, of_rows


def linear(x: Tensor, x_tangent: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, y_tangent), both (..., N), of x and x_tangent (..., K), weight (N, K) and bias (N,) or None.

    Raises ValueError when the last dimension of x is not the layer's K.
    """
    check_constants("linear", x_tangent=x_tangent)
    x, x_tangent = autocast_input(x), autocast_input(x_tangent)
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"linear: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
    return _Linear.apply(x, x_tangent, weight, bias, select_op("linear", x, weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_tangent: Tensor, weight: Tensor, bias: Tensor | None, backend: ModuleType
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
        y, y_tangent = backend.linear(as_rows(x), as_rows(x_tangent), weight, bias)
        y, y_tangent = of_rows(y, x), of_rows(y_tangent, x)
        return_constant(ctx, y_tangent)
        return y, y_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return None if g is None else of_rows(as_rows(g) @ weight.to(g.dtype), g), None, None, None, None
