"""What the operators return, in shapes alone: their fake functions, for Triton's operators and the CUDA ones alike."""

from __future__ import annotations

from torch import Tensor


def linearized_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    adjoint: bool = False,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty (y, u, c)."""
    m, rank = x.shape[0], shrink.shape[0]
    c_rank = rank if save and d_shrink is not None else 0
    return x.new_empty(m, weight.shape[0]), x.new_empty(m, rank if save else 0), x.new_empty(m, c_rank)


def lora_linear(
    x: Tensor,
    x_tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    adjoint: bool = False,
    primal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty (y, y_tangent, u, c)."""
    (m, n), rank = (x.shape[0], weight.shape[0]), shrink.shape[0]
    y = x.new_empty(m, n) if primal else x.new_empty(0)
    return y, x.new_empty(m, n), x.new_empty(m, rank), x.new_empty(m, 0 if expand is None else rank)
