"""The routed layer composed of differentiable aten calls: with factors mixed a group, or activations mixed a row.

An inventory is A (Q, S, K/Q, r) and B (Q, S, r, N/Q): S skills of rank r, cut into Q heads. Where many rows share a
task its factors are mixed once (`linlora.ops.mix_inventories`), for S r (K + N) FLOPs twice a task, and rows are
multiplied in groups. Where hardly any rows do, or S r is small, the skills' activations are mixed instead, as one LoRA
layer of rank S r:

    u = Σ_qs w_qs (x_q A_qs)           y_q += s Σ_s (w_qs u) B_qs

A weight of 0 keeps a skill out of the first form. In the second every row meets every skill, and 0 · NaN is NaN: unless
the host has seen that no weight is 0, the products are of the finite factors, rows that select others are made NaN, and
`_SkillProduct` keeps rows out of the gradients of skills that they do not select. (Not under torch.func transforms.)

Both forms have static shapes and ask nothing of the host: they are what `torch.func` transforms and torch.compile see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.kernels.grouped_problem import GroupedLoraLinear
from linlora.ops import aten
from linlora.ops.aten.dropout import dropout
from linlora.ops.aten.grouping import Blocks
from linlora.ops.aten.mixing import selected
from linlora.ops.transforms import readable, transform_active


def activations_pay(examples: int, repeats: int, groups: int, skills: int, rank: int, gathers: bool) -> bool:
    """Whether mixing a row's activations beats mixing a group's factors.

    On a CPU the former cost 1.4 us a row and skill, forward and backward; gathering rows costs as much as 4 skills, a
    group as much as 64 rows and skills (1024 to 8192 rows of 768, r = 16, 2 to 8 skills, 8 to 512 tasks, one thread).
    Where S r <= 16 they are no wider than the tile that one adapter of rank 16 fills.
    """
    rows = examples * repeats
    return skills * rank <= 16 or skills * rows <= (4 if gathers else 1) * rows + 64 * groups


def by_groups(problem: GroupedLoraLinear) -> Tensor:
    """The layer of a matrix x (M, K) with mixed factors."""
    x, layout, scaling = problem.x, problem.groups.layout(aten), problem.scaling
    y, low, u, expand = _frozen(problem)
    c = None if problem.d_shrink is None else _product(low, _like(x, problem.d_shrink), layout)
    own = c if u is None else u  # what a group's own B multiplies
    assert own is not None
    y = torch.add(y, _product(own, _like(x, problem.d_expand), layout), alpha=scaling)
    if u is None or expand is None:
        return y
    return torch.addmm(y, u if c is None else u + c, expand, alpha=scaling)


def by_activations(problem: GroupedLoraLinear, mixture: Tensor, task_ids: Tensor) -> Tensor:
    """The layer of a matrix x (M, K) with an inventory and weights mixture[task_ids], task_ids (M,)."""
    x, scaling = problem.x, problem.scaling
    wide = mixture.to(torch.promote_types(mixture.dtype, torch.float32))  # backward sums a task's rows in it
    w = wide[task_ids].to(x.dtype).transpose(0, 1)  # (Q, M, S)
    y, low, u, expand = _frozen(problem)
    A, B = _like(x, problem.d_shrink), _like(x, problem.d_expand)
    selects = None if readable(mixture) else w != 0
    if selects is not None:
        y = y + _nan_where_selected([B] if A is None else [A, B], selects)
        A, B = (None if A is None else _finite(A)), _finite(B)
    c = None if A is None else _shrink(low, A, w, selects)
    own = c if u is None else u
    assert own is not None
    y = torch.add(y, _expand(own, B, w, selects), alpha=scaling)
    if u is None or expand is None:
        return y
    return torch.addmm(y, u if c is None else u + c, expand, alpha=scaling)


def _frozen(problem: GroupedLoraLinear) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What all rows share: the frozen layer's y, x', u = x' A0ᵀ and B0ᵀ."""
    x = problem.x
    y, low = linear(x, _like(x, problem.weight), _like(x, problem.bias)), dropout(x, problem.dropout_p, problem.seed)
    u = None if problem.shrink is None else linear(low, _like(x, problem.shrink))
    return y, low, u, None if problem.expand is None else _like(x, problem.expand).t()


def _product(rows: Tensor, factors: Tensor, layout: Blocks) -> Tensor:
    """Every row times the factor of its group: (M, b) of rows (M, a) and factors (T, a, b)."""
    blocks = torch.bmm(layout.cut(layout.gather(rows)), layout.of_blocks(factors))
    return layout.scatter(blocks.flatten(0, 1))


def _shrink(x: Tensor, A: Tensor, w: Tensor, selects: Tensor | None) -> Tensor:
    """Σ_qs w_qs (x_q A_qs), (M, r), of weights (Q, M, S)."""
    heads, skills, _, rank = A.shape
    per_head = x.unflatten(1, (heads, x.shape[1] // heads)).transpose(0, 1)
    activations = _skill_product(per_head, A.transpose(1, 2).flatten(2), selects, rank, False)
    return _weighted(w, activations.unflatten(2, (skills, rank)), selects).sum((0, 2))


def _expand(u: Tensor, B: Tensor, w: Tensor, selects: Tensor | None) -> Tensor:
    """Σ_s (w_qs u) B_qs in every head q, (M, N)."""
    weighted = _weighted(w, u.unsqueeze(1), selects).flatten(2)
    return _skill_product(weighted, B.flatten(1, 2), selects, B.shape[2], True).transpose(0, 1).flatten(1)


def _weighted(w: Tensor, activations: Tensor, selects: Tensor | None) -> Tensor:
    """w (Q, M, S) times activations (..., S or 1, r), 0 where a skill is not selected."""
    product = w.unsqueeze(-1) * activations
    return product if selects is None else torch.where(selects.unsqueeze(-1), product, 0.0)


def _finite(factors: Tensor) -> Tensor:
    return torch.where(factors.isfinite(), factors, 0.0)


def _nan_where_selected(factors: list[Tensor], selects: Tensor) -> Tensor:
    """(M, 1): NaN for rows that select a skill which is not finite, 0 for the others."""
    lost = torch.stack([~f.detach().isfinite().flatten(2).all(2) for f in factors]).any(0)  # (Q, S)
    found = (selects & lost.unsqueeze(1)).any(2).any(0).unsqueeze(1)
    return torch.where(found, torch.nan, torch.zeros((), dtype=factors[0].dtype, device=selects.device))


def _skill_product(rows: Tensor, factors: Tensor, selects: Tensor | None, rank: int, expands: bool) -> Tensor:
    """rows (Q, M, a) times factors (Q, a, b), of which a (`expands`) or b are the ranks of all skills."""
    if selects is None or transform_active():
        return torch.bmm(rows, factors)
    return _SkillProduct.apply(rows, factors, selects.repeat_interleave(rank, 2), expands)


class _SkillProduct(torch.autograd.Function):
    """The product, with gradients for factors from the rows alone that select their skill: `selects` (Q, M, S r)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factors: Tensor, selects: Tensor, expands: bool) -> Tensor:
        ctx.save_for_backward(rows, factors, selects)
        ctx.expands = expands
        return torch.bmm(rows, factors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, factors, selects = ctx.saved_tensors
        d_factors = None
        if ctx.needs_input_grad[1]:
            of_ranks, wide = (rows, g) if ctx.expands else (g, rows)
            d_factors = selected(of_ranks.mT, wide, selects.mT)
            d_factors = d_factors if ctx.expands else d_factors.mT
        return torch.bmm(g, factors.mT), d_factors, None, None


def _like(x: Tensor, tensor: Tensor | None) -> Tensor:
    return tensor if tensor is None else tensor.to(x.dtype)  # type: ignore[return-value]
