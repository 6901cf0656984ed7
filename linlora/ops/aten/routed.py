"""The routed LoRA primitives of the `torch` backend, on rows that `group_rows` has laid out in blocks.

Every group t has factors of its own, mixed before; a layer may also have a linearization point, which all rows share.
Forward and backward are one function of them:

    shrink S0   (K, r)      d_shrink dS_t  (T, K, r)      wide → rank      forward: A0ᵀ, A_t     backward: B0, B_tᵀ
    expand E0   (r, N)      d_expand dE_t  (T, r, N)      rank → wide      forward: B0ᵀ, B_t     backward: A0, A_tᵀ

    u = x' S0       c = u + x' dS_t       y = x Wᵀ + b + s [ c E0 + (u, without S0: c) dE_t ]

All four make the linearized layer, d_shrink and d_expand plain routing; at B0 = 0 forward has shrink and d_expand,
backward d_shrink and expand. With dropout, x' = x ⊙ mask / (1 − p); in the adjoint the mask falls on the update.

The wide operands come twice: as rows, for the frozen product, and `place`d, for the products of the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.ops.aten.grouping import Blocks
from linlora.ops.aten.lora import dropout


def place(x: Tensor, layout: Blocks, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """x' (M, K) as the products of the blocks read it: (P, K), x itself where its rows are blocks as they come."""
    return layout.gather(dropout(x, dropout_p, seed))


def grouped_lora_linear(
    x: Tensor,
    placed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor | None,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor | None,
    layout: Blocks,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    adjoint: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (M, N), u, c (M, r)) of x (M, K); u or c is (M, 0) where nothing makes it."""
    y = linear(x, weight, bias)
    u, c = _shrink(placed, shrink, d_shrink, layout)
    if adjoint and dropout_p > 0.0:
        update = torch.zeros_like(y)
        _add_update(update, u, c, expand, d_expand, layout, scaling)
        y += dropout(update, dropout_p, seed)
    else:
        _add_update(y, u, c, expand, d_expand, layout, scaling)
    return y, layout.scatter(u), layout.scatter(c)


def dual_grouped_lora_linear(
    x: Tensor,
    x_tangent: Tensor | None,
    placed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor,
    layout: Blocks,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both streams, (y, y_tangent, u): y = x Wᵀ + b + s u E0 and y_t = x_t Wᵀ + s [ c E0 + u dE_t ], with
    c = x' dS_t + x_t' S0. Without x_tangent its terms are absent; without `expand` (B0 = 0) y is the frozen layer."""
    u, c = _shrink(placed, shrink, d_shrink, layout)
    y, rows_u = linear(x, weight, bias), layout.scatter(u)
    y_tangent = y.new_zeros(y.shape) if x_tangent is None else linear(x_tangent, weight)
    if expand is not None:
        expand = expand.to(x.dtype)
        y.addmm_(rows_u, expand, alpha=scaling)
        low = layout.scatter(c - u)
        if x_tangent is not None:
            low.addmm_(dropout(x_tangent, dropout_p, seed), shrink.to(x.dtype))
        y_tangent.addmm_(low, expand, alpha=scaling)
    _add_update(y_tangent, u, c, None, d_expand, layout, scaling)
    return y, y_tangent, rows_u


def grouped_shrink(
    placed: Tensor, shrink: Tensor | None, d_shrink: Tensor | None, layout: Blocks, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """u and c alone, (M, r) or (M, 0)."""
    u, c = _shrink(placed, shrink, d_shrink, layout)
    return layout.scatter(u), layout.scatter(c)


def grouped_gradients(
    p: Tensor | None,
    g: Tensor | None,
    q: Tensor | None,
    x: Tensor | None,
    layout: Blocks,
    n_groups: int,
    scaling: float,
    out_dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of every group's factors, s pᵀ g (T, r, N) and s x'ᵀ q (T, K, r), of rows p, q (M, r) and placed
    g and x; a missing pair gives (0,)."""
    empty = torch.empty(0, dtype=out_dtype, device=(g if x is None else x).device)  # type: ignore[union-attr]
    d_expand = empty if p is None or g is None else _reduce(p, g, layout, n_groups, scaling).to(out_dtype)
    d_shrink = empty if q is None or x is None else _reduce(q, x, layout, n_groups, scaling).mT.to(out_dtype)
    return d_expand, d_shrink


def _shrink(placed: Tensor, shrink: Tensor | None, d_shrink: Tensor | None, layout: Blocks) -> tuple[Tensor, Tensor]:
    """u and c of every place; both in one product where both are wanted."""
    nothing = placed.new_empty(placed.shape[0], 0)
    if d_shrink is None:
        assert shrink is not None
        return placed @ shrink.to(placed.dtype), nothing
    factors = d_shrink.to(placed.dtype)
    if shrink is not None:
        point = shrink.to(placed.dtype).expand_as(factors)
        factors = torch.cat((point, point + factors), 2)
    low = torch.bmm(layout.cut(placed), layout.of_blocks(factors)).flatten(0, 1)
    return (nothing, low) if shrink is None else low.chunk(2, 1)  # type: ignore[return-value]


def _add_update(
    y: Tensor,
    u: Tensor,
    c: Tensor,
    expand: Tensor | None,
    d_expand: Tensor | None,
    layout: Blocks,
    scaling: float,
) -> None:
    """y (M, N) += s [ c E0 + (u or c) dE_t ], of places u and c."""
    if d_expand is None:
        assert expand is not None
        y.addmm_(layout.scatter(c), expand.to(y.dtype), alpha=scaling)
        return
    factors, low = d_expand.to(y.dtype), u if u.shape[1] else c
    if expand is not None:
        factors = torch.cat((factors, expand.to(y.dtype).expand_as(factors)), 1)
        low = torch.cat((u, c), 1)
    low, factors = layout.cut(low), layout.of_blocks(factors)
    if layout.order is None:
        layout.cut(y).baddbmm_(low, factors, alpha=scaling)
    else:
        y.add_(layout.scatter(torch.bmm(low, factors).flatten(0, 1)), alpha=scaling)


def _reduce(low: Tensor, placed: Tensor, layout: Blocks, n_groups: int, scaling: float) -> Tensor:
    """s lowᵀ wide over the rows of every group, (T, r, columns), summed in float32 or wider."""
    products = torch.bmm(layout.cut(layout.gather(low)).mT, layout.cut(placed))
    dtype = torch.promote_types(low.dtype, torch.float32)
    total = torch.zeros(n_groups, *products.shape[1:], dtype=dtype, device=low.device)
    return total.index_add_(0, layout.groups, products.to(dtype), alpha=scaling)
