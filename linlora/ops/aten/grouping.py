"""How the `torch` backend lays out grouped rows: in blocks of one length, each of one group.

Every product of a routed layer is one batched call over the blocks then, whatever the tasks. (A loop of small products
over the groups waits for all threads at each: 10 instead of 0.6 ms for x A at 2048x768x16 and 8 tasks, on 2 busy
cores.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_BLOCK = 16
"""Rows an example from which it is a block as it stands; shorter ones are gathered, one pass over x and one over y.

At 16 rows a copy of a factor of rank 16 is as large as its block, and gathering falls away (32x16 rows, 768x768, 8
tasks mixed before: 1.07 -> 1.03 times one adapter); at 8 rows gathering wins (1.07, and 1.15 in blocks)."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of `length` places, all of group groups[block].

    Without `order`, the rows are the places as they come. With it, place p holds row order[p], row i is at place
    inverse[i], and the places `padding`, which fill up the last block of a group, hold zeros. Nothing of another row
    is in a group's block, so a NaN in a row or a factor stays in its group, in sums over rows too.
    """

    groups: Tensor
    length: int
    order: Tensor | None = None
    inverse: Tensor | None = None
    padding: Tensor | None = None

    def gather(self, rows: Tensor) -> Tensor:
        """The places (P, columns) of rows (M, columns)."""
        if self.order is None or self.padding is None:
            return rows
        return rows.index_select(0, self.order).index_fill(0, self.padding, 0.0)

    def scatter(self, placed: Tensor) -> Tensor:
        """The rows (M, columns) back from the places (P, columns)."""
        return placed if self.inverse is None else placed.index_select(0, self.inverse)

    def cut(self, placed: Tensor) -> Tensor:
        """(P, columns) as (blocks, length, columns)."""
        return placed.unflatten(0, (self.groups.shape[0], self.length))

    def of_blocks(self, factors: Tensor) -> Tensor:
        """Every block's own of a factor (T, a, b), in the factor's memory layout."""
        if factors.stride(-1) != 1:
            return factors.mT.index_select(0, self.groups).mT
        return factors.index_select(0, self.groups)


def group_rows(group_ids: Tensor, n_groups: int, repeats: int, static: bool) -> Blocks:
    """The blocks of rows whose groups are `group_ids` (E,), each id for `repeats` rows in succession.

    `static` makes as many blocks as there may be, which the host knows, rather than as many as there are.

    >>> import torch
    >>> examples = group_rows(torch.tensor([5, 2, 5]), 6, repeats=32, static=False)
    >>> examples.groups.tolist(), examples.length, examples.order
    ([5, 2, 5], 32, None)
    >>> tokens = group_rows(torch.tensor([1, 0, 1]), 2, repeats=1, static=False)
    >>> tokens.groups.tolist(), tokens.length, tokens.padding.tolist(), tokens.inverse.tolist()
    ([0, 1], 4, [1, 2, 3, 6, 7], [4, 0, 5])
    """
    if repeats >= MIN_BLOCK:
        return Blocks(group_ids, repeats)
    rows, device = group_ids.shape[0] * repeats, group_ids.device
    if rows == 0:
        return Blocks(group_ids[:0], MIN_BLOCK)
    length = _block_length(rows, n_groups)
    ascending, by_group = group_ids.unsqueeze(1).expand(-1, repeats).reshape(-1).sort(stable=True)
    first_row = torch.searchsorted(ascending, torch.arange(n_groups + 1, device=device))
    sizes = first_row.diff()
    blocks = (sizes + length - 1) // length
    past_block = blocks.cumsum(0)
    first_block = past_block - blocks
    inverse = torch.empty_like(by_group)
    inverse[by_group] = first_block[ascending] * length + torch.arange(rows, device=device) - first_row[ascending]
    count = (rows + n_groups * (length - 1)) // length if static else int(past_block[-1])
    block = torch.arange(count, device=device)
    groups = torch.searchsorted(past_block, block, right=True).clamp(max=n_groups - 1)
    rank = ((block - first_block[groups]) * length).unsqueeze(1) + torch.arange(length, device=device)  # in the group
    real = rank < sizes[groups].unsqueeze(1)
    order = by_group[torch.where(real, first_row[groups].unsqueeze(1) + rank, 0).flatten()]
    padding = real.flatten().to(torch.int8).argsort(stable=True)[: order.shape[0] - rows]  # no nonzero, which waits
    return Blocks(groups, length, order, inverse, padding)


def _block_length(rows: int, groups: int) -> int:
    """The power of two near sqrt(8 rows a group): long blocks pad, short ones copy many factors (2048x768, r = 16)."""
    return 2 ** max(round(math.log2(math.sqrt(8.0 * rows / max(groups, 1)) + 1e-9)), 2)
