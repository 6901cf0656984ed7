"""The routed layer composed of differentiable aten calls: with factors mixed a group, or activations mixed a row.

An inventory is A (Q, S, K/Q, r) and B (Q, S, r, N/Q): S skills of rank r, cut into Q heads. Where many rows share a
task its factors are mixed once (`linlora.ops.mix_inventories`), for S r (K + N) FLOPs twice a task, and rows are
multiplied in groups. Where hardly any rows do, or S r is small, the skills' activations are mixed instead, as one LoRA
layer of rank S r:

    u = Σ_qs w_qs (x_q A_qs)           y_q += s Σ_s (w_qs u) B_qs

A weight of 0 keeps a skill out of the first form; in the second every row meets every skill, and 0 · NaN is NaN.

Both forms have static shapes and ask nothing of the host: they are what `torch.func` transforms and torch.compile see.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.ops.aten.grouping import Blocks
from linlora.reference import dropout


def activations_pay(examples: int, repeats: int, groups: int, skills: int, rank: int, gathers: bool) -> bool:
    """Whether mixing a row's activations beats mixing a group's factors.

    On a CPU the former cost 1.4 us a row and skill, forward and backward; gathering rows costs as much as 4 skills, a
    group as much as 64 rows and skills (1024 to 8192 rows of 768, r = 16, 2 to 8 skills, 8 to 512 tasks, one thread).
    Where S r <= 16 they are no wider than the tile that one adapter of rank 16 fills.
    """
    rows = examples * repeats
    return skills * rank <= 16 or skills * rows <= (4 if gathers else 1) * rows + 64 * groups


def by_groups(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    layout: Blocks,
    scaling: float,
    A0: Tensor | None,
    B0: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The layer of a matrix x (M, K) with factors A (T, K, r), B (T, r, N) of the groups of `layout`."""
    y, low = linear(x, _like(x, weight), _like(x, bias)), dropout(x, dropout_p, seed)
    u = None if A0 is None else linear(low, _like(x, A0))
    c = None if A is None else _product(low, _like(x, A), layout)
    own = c if u is None else u  # what a group's own B multiplies
    assert own is not None
    y = torch.add(y, _product(own, _like(x, B), layout), alpha=scaling)
    if u is None or B0 is None:
        return y
    return torch.addmm(y, u if c is None else u + c, _like(x, B0).t(), alpha=scaling)


def by_activations(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    mixture: Tensor,
    scaling: float,
    task_ids: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The layer of a matrix x (M, K) with weights mixture[task_ids], task_ids (M,)."""
    wide = mixture.to(torch.promote_types(mixture.dtype, torch.float32))  # backward sums a task's rows in it
    w = wide[task_ids].to(x.dtype).transpose(0, 1)  # (Q, M, S)
    y, low = linear(x, _like(x, weight), _like(x, bias)), dropout(x, dropout_p, seed)
    c = None if A is None else _shrink(low, _like(x, A), w)
    if A0 is None:
        assert c is not None
        return torch.add(y, _expand(c, _like(x, B), w), alpha=scaling)
    u = linear(low, _like(x, A0))
    y = torch.add(y, _expand(u, _like(x, B), w), alpha=scaling)
    return y if B0 is None else torch.addmm(y, u if c is None else u + c, _like(x, B0).t(), alpha=scaling)


def _product(rows: Tensor, factors: Tensor, layout: Blocks) -> Tensor:
    """Every row times the factor of its group: (M, b) of rows (M, a) and factors (T, a, b)."""
    blocks = torch.bmm(layout.cut(layout.gather(rows)), layout.of_blocks(factors))
    return layout.scatter(blocks.flatten(0, 1))


def _shrink(x: Tensor, A: Tensor, w: Tensor) -> Tensor:
    """Σ_qs w_qs (x_q A_qs), (M, r), of weights (Q, M, S)."""
    heads, skills, _, rank = A.shape
    per_head = x.unflatten(1, (heads, x.shape[1] // heads)).transpose(0, 1)
    activations = torch.bmm(per_head, A.transpose(1, 2).flatten(2)).unflatten(2, (skills, rank))
    return (w.unsqueeze(-1) * activations).sum((0, 2))


def _expand(u: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """Σ_s (w_qs u) B_qs in every head q, (M, N)."""
    weighted = (w.unsqueeze(-1) * u.unsqueeze(1)).flatten(2)
    return torch.bmm(weighted, B.flatten(1, 2)).transpose(0, 1).flatten(1)


def _like(x: Tensor, tensor: Tensor | None) -> Tensor:
    return tensor if tensor is None else tensor.to(x.dtype)  # type: ignore[return-value]
