"""Mixes adapters that were trained apart: they have no common start, so their updates add, and their factors do not.

A group of rows gets the factors of its adapters side by side, with its weights in B:

    Σ_s w_s B_s A_s = [w_1 B_1, w_2 B_2, …] [A_1; A_2; …]        rank n r, n the adapters of the largest mixture

This is exact and linear in w, without the cross terms w_s w_k B_s A_k of mixed factors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def side_by_side(A: Tensor, B: Tensor, weights: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The factors (T, K, n r), (T, n r, N) of T groups of rows, whose update is the weighted sum of the adapters'.

    An adapter of weight 0 is left out of its group, whatever it holds, unless the weights ask for a gradient.

    Args:
        A: (1, S, K, r), B: (1, S, r, N), the inventory. weights: (T, 1, S).
        most: n, how many adapters a group has at most.

    >>> A, B = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    >>> A_t, B_t = side_by_side(A, B, torch.tensor([[[2.0, -1.0]], [[0.0, 0.5]]]), 2)
    >>> (A_t @ B_t).flatten().tolist()
    [-28.0, 15.0]
    """
    of_group = weights.squeeze(1)
    used = torch.ones_like(of_group, dtype=torch.bool) if weights.requires_grad else of_group != 0
    chosen = used.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    used, of_group = (of.gather(1, chosen)[..., None, None] for of in (used, of_group))
    A, B = (torch.where(used, factor[0][chosen], 0.0) for factor in (A, B))
    return A.transpose(1, 2).flatten(2), (of_group * B).flatten(1, 2)


def most_adapters(weights: Tensor) -> int:
    """How many adapters a mixture of (..., S) has at most, for `side_by_side`; all where weights ask for a gradient."""
    if weights.requires_grad:
        return weights.shape[-1]
    return int((weights != 0).sum(-1).max()) if weights.numel() else 1
