"""The LoRA primitives of the `torch` backend, on matrices.

The roles are named by what they do, because forward and backward are the same function of them:

    shrink S0, d_shrink dS   (r, K)   wide → rank       forward: A0, dA       backward: B0ᵀ, dBᵀ
    expand E0, d_expand dE   (N, r)   rank → wide       forward: B0, dB       backward: A0ᵀ, dAᵀ
    weight                   (N, K)                     forward: W            backward: Wᵀ

The short form, for adapters that start at B0 = 0, has only `shrink` and `d_expand`: A0 and dB forward, dBᵀ and A0ᵀ
backward. With dropout, x' = x ⊙ mask / (1 − p) feeds the shrink; in the adjoint the same mask falls on the low-rank
update instead.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.reference import keep_mask

_MASK_ROWS = 128  # rows of the mask made at a time: they stay in the L2 cache (8.0 -> 2.4 ms at 2048x1024, 2 cores)
_REDUCTION_BLOCKS = 8


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
    """y = x Wᵀ + b + s [c E0ᵀ + u dEᵀ] with u = x' S0ᵀ and c = x' (S0 + dS)ᵀ; returns (y, u, c).

    c has no columns in the short form; without `save` neither u nor c has.
    """
    shrink, d_shrink, expand, d_expand = _as_dtype(x.dtype, shrink, d_shrink, expand, d_expand)
    nothing = x.new_empty(x.shape[0], 0)
    if not save and dropout_p == 0.0 and folding_pays(x, weight):
        folded = _add_product(weight, d_expand, shrink, scaling)
        if expand is not None:
            folded = _add_product(folded, expand, shrink + d_shrink, scaling)
        return linear(x, folded, bias), nothing, nothing
    y = linear(x, weight, bias)
    low = x if adjoint else dropout(x, dropout_p, seed)
    u = low @ shrink.t()
    c = nothing if d_shrink is None else torch.addmm(u, low, d_shrink.t())
    _add_update(y, ((u, d_expand), (c, expand)), scaling, dropout_p if adjoint else 0.0, seed)
    return (y, u, c) if save else (y, nothing, nothing)


def folding_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x (W + ΔW)ᵀ beats adding a low-rank update to x Wᵀ, when u and c are not wanted.

    Forming W + ΔW takes 2r NK FLOPs, the update 2r M(N + K). It is worth a transient buffer of W's size where that is
    at most a third of x and y together, on a CPU (a GPU would rather not write it), and exact enough from fp32 on.
    """
    n, k = weight.shape
    return not x.is_cuda and x.dtype in (torch.float32, torch.float64) and x.shape[0] * (n + k) >= 3 * n * k


def _add_product(weight: Tensor, expand: Tensor, shrink: Tensor, scaling: float) -> Tensor:
    """weight + s expand shrink, in weight's own layout: Wᵀ is not transposed in memory for it."""
    if weight.stride(0) < weight.stride(1):
        return torch.addmm(weight.t(), shrink.t(), expand.t(), alpha=scaling).t()
    return torch.addmm(weight, expand, shrink, alpha=scaling)


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
    """Both streams: y = x Wᵀ + b + s u E0ᵀ and y_t = x_t Wᵀ + s [c E0ᵀ + u dEᵀ]; returns (y, y_t, u, c).

    Here u = x' S0ᵀ and c = x' dSᵀ + x_t' S0ᵀ. Without `x_tangent` its terms are absent; with `primal=False` y is not
    computed and comes back empty, which is what backward asks for when the input had no tangent.
    """
    shrink, d_shrink, expand, d_expand = _as_dtype(x.dtype, shrink, d_shrink, expand, d_expand)
    masked_out = dropout_p if adjoint else 0.0
    low = x if adjoint else dropout(x, dropout_p, seed)
    u = low @ shrink.t()
    c = u.new_empty(u.shape[0], 0)
    if d_shrink is not None:
        c = low @ d_shrink.t()
        if x_tangent is not None:
            low_tangent = x_tangent if adjoint else dropout(x_tangent, dropout_p, seed)
            c.addmm_(low_tangent, shrink.t())
    if primal:
        y = linear(x, weight, bias)
        _add_update(y, ((u, expand),), scaling, masked_out, seed)
    else:
        y = x.new_empty(0)
    y_tangent = x.new_zeros(x.shape[0], weight.shape[0]) if x_tangent is None else linear(x_tangent, weight)
    _add_update(y_tangent, ((u, d_expand), (c, expand)), scaling, masked_out, seed)
    return y, y_tangent, u, c


def factor_gradients(
    p: Tensor | None,
    g: Tensor | None,
    q: Tensor | None,
    x: Tensor | None,
    scaling: float,
    out_dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two skinny products of backward, (s gᵀ p, s qᵀ x'): (N, r) and (r, K); a missing pair gives (0,)."""
    empty = torch.empty(0, dtype=out_dtype, device=(g if x is None else x).device)  # type: ignore[union-attr]
    d_expand = empty if p is None or g is None else _reduce_rows(p, g).t().to(out_dtype) * scaling
    d_shrink = empty if q is None or x is None else _reduce_rows(q, dropout(x, dropout_p, seed)).to(out_dtype) * scaling
    return d_expand, d_shrink


def _reduce_rows(low: Tensor, wide: Tensor) -> Tensor:
    """lowᵀ wide (r, columns), a long sum over rows. A CPU's matrix product does not share such a sum between threads:
    in independent blocks it takes 0.8 instead of 1.2 ms (2048x16 by 2048x1024, 2 cores)."""
    rows = low.shape[0]
    if low.is_cuda or rows < 64 * _REDUCTION_BLOCKS or rows % _REDUCTION_BLOCKS:
        return low.t() @ wide
    blocks = (_REDUCTION_BLOCKS, rows // _REDUCTION_BLOCKS, -1)
    return torch.bmm(low.reshape(blocks).transpose(1, 2), wide.reshape(blocks)).sum(0)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x ⊙ mask / (1 − p) for a matrix x, with the mask of `linlora.reference.keep_mask` made block by block."""
    if p == 0.0:
        return x
    rows, columns = x.shape
    step = rows if x.is_cuda or torch.compiler.is_compiling() else _MASK_ROWS
    blocks = [
        x[first : first + step] * keep_mask(min(step, rows - first), columns, p, seed, first).to(x.dtype)
        for first in range(0, rows, max(step, 1))
    ]
    return torch.cat(blocks).mul_(1.0 / (1.0 - p)) if blocks else x


def _add_update(
    y: Tensor, terms: tuple[tuple[Tensor, Tensor | None], ...], scaling: float, p: float, seed: Tensor | None
) -> None:
    """y += s mask ⊙ Σ low expandᵀ, in place."""
    if p == 0.0:
        for low, expand in terms:
            if expand is not None:
                y.addmm_(low, expand.t(), alpha=scaling)
        return
    update = torch.zeros_like(y)
    _add_update(update, terms, scaling, 0.0, None)
    y += dropout(update, p, seed)


def _as_dtype(dtype: torch.dtype, *factors: Tensor | None) -> list:
    return [factor if factor is None else factor.to(dtype) for factor in factors]
