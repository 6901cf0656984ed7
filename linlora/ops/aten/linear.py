"""A frozen linear layer on both streams: y = x Wᵀ + b and y_t = x_t Wᵀ."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, x_tangent: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y, y_t), both (M, N), of matrices x and x_t (M, K)."""
    return functional.linear(x, weight, bias), functional.linear(x_tangent, weight)
