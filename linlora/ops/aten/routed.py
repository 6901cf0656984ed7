"""The routed LoRA primitives of the `torch` backend, on rows that `group_rows` has laid out in blocks.

A backward reads its cotangent twice, for the adjoint and for the gradients of the factors: `place` lays it out once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.kernels.grouped_problem import GroupedGradients, GroupedLoraLinear
from linlora.kernels.problem import Gradients, Result
from linlora.ops.aten.dropout import dropout
from linlora.ops.aten.grouping import Blocks


def place(x: Tensor, layout: Blocks, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """x' (M, K) as the products of the blocks read it: (P, K), x itself where its rows are blocks as they come."""
    return layout.gather(dropout(x, dropout_p, seed))


def grouped_lora_linear(problem: GroupedLoraLinear) -> Result:
    """The result of one stream or two, of matrices."""
    layout = problem.groups
    u, c = _shrink(problem)
    y = linear(problem.x, problem.weight, problem.bias)
    if problem.two_streams:
        assert u is not None
        return _two_streams(problem, y, u, c)
    if problem.masks_update and problem.dropout_p > 0.0:
        update = torch.zeros_like(y)
        _add_update(update, u, c, problem)
        y += dropout(update, problem.dropout_p, problem.seed)
    else:
        _add_update(y, u, c, problem)
    return Result(y, None, _scattered(u, layout), _scattered(c, layout))


def _two_streams(problem: GroupedLoraLinear, y: Tensor, u: Tensor, c: Tensor | None) -> Result:
    """Both streams, from the frozen primal y and the places u and c = u + x' dS_t."""
    x, x_tangent, expand = problem.x, problem.x_tangent, problem.expand
    rows_u = problem.groups.scatter(u)
    y_tangent = y.new_zeros(y.shape) if x_tangent is None else linear(x_tangent, problem.weight)
    if expand is not None:
        assert problem.shrink is not None
        assert c is not None
        expand = expand.t().to(x.dtype)
        y.addmm_(rows_u, expand, alpha=problem.scaling)
        low = problem.groups.scatter(c - u)
        if x_tangent is not None:
            low.addmm_(dropout(x_tangent, problem.dropout_p, problem.seed), problem.shrink.t().to(x.dtype))
        y_tangent.addmm_(low, expand, alpha=problem.scaling)
    _add_update(y_tangent, u, None, problem._replace(expand=None))
    return Result(y, y_tangent, rows_u)


def grouped_shrink(problem: GroupedLoraLinear) -> tuple[Tensor | None, Tensor | None]:
    """u and c alone, (M, r) each, None where no factor makes it."""
    u, c = _shrink(problem)
    return _scattered(u, problem.groups), _scattered(c, problem.groups)


def grouped_gradients(problem: GroupedGradients) -> Gradients:
    """The gradients of every group's factors, (T, r, N) and (T, K, r); a missing pair gives None."""
    p, g, q, x = problem[:4]
    d_expand = None if p is None or g is None else _reduce(p, g, problem).to(problem.dtype)
    d_shrink = None if q is None or x is None else _reduce(q, x, problem).mT.to(problem.dtype)
    return Gradients(d_expand, d_shrink if d_shrink is None else d_shrink.contiguous())  # or whoever mixes it copies


def _shrink(problem: GroupedLoraLinear) -> tuple[Tensor | None, Tensor | None]:
    """u and c of every place; both in one product where both are wanted."""
    layout, placed = problem.groups, problem.placed
    if placed is None:
        placed = place(problem.x, layout, 0.0 if problem.masks_update else problem.dropout_p, problem.seed)
    shrink = None if problem.shrink is None else problem.shrink.t().to(placed.dtype)
    if problem.d_shrink is None:
        assert shrink is not None
        return placed @ shrink, None
    factors = problem.d_shrink.to(placed.dtype)
    if shrink is not None:
        point = shrink.expand_as(factors)
        factors = torch.cat((point, point + factors), 2)
    low = torch.bmm(layout.cut(placed), layout.of_blocks(factors)).flatten(0, 1)
    return (None, low) if shrink is None else low.chunk(2, 1)  # type: ignore[return-value]


def _add_update(y: Tensor, u: Tensor | None, c: Tensor | None, problem: GroupedLoraLinear) -> None:
    """y (M, N) += s [ c E0ᵀ + (u or c) dE_t ], of places u and c."""
    layout, scaling = problem.groups, problem.scaling
    expand = None if problem.expand is None else problem.expand.t().to(y.dtype)
    if problem.d_expand is None:
        assert expand is not None
        assert c is not None
        y.addmm_(layout.scatter(c), expand, alpha=scaling)
        return
    factors, low = problem.d_expand.to(y.dtype), c if u is None else u
    if expand is not None:
        assert u is not None
        assert c is not None
        factors = torch.cat((factors, expand.expand_as(factors)), 1)
        low = torch.cat((u, c), 1)
    low, factors = layout.cut(low), layout.of_blocks(factors)
    if layout.order is None:
        layout.cut(y).baddbmm_(low, factors, alpha=scaling)
    else:
        y.add_(layout.scatter(torch.bmm(low, factors).flatten(0, 1)), alpha=scaling)


def _scattered(placed: Tensor | None, layout: Blocks) -> Tensor | None:
    return None if placed is None else layout.scatter(placed)


def _reduce(low: Tensor, placed: Tensor, problem: GroupedGradients) -> Tensor:
    """s lowᵀ wide over the rows of every group, (T, r, columns) of rows (M, r) and places (P, columns), summed in
    float32 or wider. The other way round a rank below 16 takes MKL four to six times as long."""
    layout = problem.groups
    products = torch.bmm(layout.cut(layout.gather(low)).mT, layout.cut(placed))
    dtype = torch.promote_types(low.dtype, torch.float32)
    total = torch.zeros(problem.n_groups, *products.shape[1:], dtype=dtype, device=low.device)
    return total.index_add_(0, layout.groups, products.to(dtype), alpha=problem.scaling)
