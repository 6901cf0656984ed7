"""The routed LoRA primitives of the `torch` backend, for rows that are grouped by task on the host (a CPU's tensors).

Rows of one task form groups, and groups are cut into blocks of one length, so that every product is one batched call
whatever the tasks. (A loop of small products over the groups waits for all threads at each: 10 instead of 0.6 ms for
x A at 2048x768x16 and 8 tasks, on 2 busy cores.) Every group has factors of its own, mixed before; forward and
backward are one function of them:

    shrink  (U, K, r)   wide → rank       forward: A_u     backward: B_uᵀ
    expand  (U, r, N)   rank → wide       forward: B_u     backward: A_uᵀ

The update is added to the frozen product in place: nothing of the size of x, y or W is made for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

MIN_BLOCK = 32
"""Rows an example from which it is a block as it stands; shorter ones are gathered, one pass over x and one over y."""


@dataclass(frozen=True)
class Groups:
    """Which rows share factors: blocks of `length` rows, of group `groups[block]`, whose task is `tasks[group]`.

    tasks: (U,) the ids that occur, ascending. order: (P,) the rows of the blocks, P >= M, or None where the rows are
    blocks as they come. A group's last block is filled up with its last row, and `padding` holds those places; row i
    is at place inverse[i].
    """

    tasks: Tensor
    groups: Tensor
    length: int
    order: Tensor | None = None
    inverse: Tensor | None = None
    padding: Tensor | None = None

    def gather(self, rows: Tensor) -> Tensor:
        """The blocks' rows (P, columns) of rows (M, columns)."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def scatter(self, placed: Tensor) -> Tensor:
        """The rows (M, columns) back from the blocks' places (P, columns)."""
        return placed if self.inverse is None else placed.index_select(0, self.inverse)

    def blocks(self, placed: Tensor) -> Tensor:
        """(P, columns) as (blocks, length, columns)."""
        return placed.unflatten(0, (len(self.groups), self.length))

    def of_blocks(self, factors: Tensor) -> Tensor:
        """Every block's own of a factor (U, a, b), in the factor's memory layout."""
        if factors.stride(-1) != 1:
            return factors.mT.index_select(0, self.groups).mT
        return factors.index_select(0, self.groups)


def group_rows(task_ids: Tensor, repeats: int = 1) -> Groups:
    """The groups of rows whose tasks are `task_ids` (E,), a CPU tensor, each id for `repeats` rows in succession.

    >>> import torch
    >>> examples = group_rows(torch.tensor([5, 2, 5]), repeats=32)
    >>> examples.tasks.tolist(), examples.groups.tolist(), examples.length
    ([2, 5], [1, 0, 1], 32)
    >>> tokens = group_rows(torch.tensor([5, 2, 5]))
    >>> tokens.groups.tolist(), tokens.length, tokens.order.tolist()[:4], tokens.inverse.tolist()
    ([0, 1], 4, [1, 1, 1, 1], [4, 0, 5])
    """
    tasks, groups = torch.unique(task_ids, return_inverse=True)
    if repeats >= MIN_BLOCK:
        return Groups(tasks, groups, repeats)
    groups = groups.repeat_interleave(repeats)
    sizes = torch.bincount(groups, minlength=len(tasks))
    length = _block_length(len(groups), len(tasks))
    blocks = (sizes + length - 1) // length
    first_place, first_row = (blocks.cumsum(0) - blocks) * length, sizes.cumsum(0) - sizes
    block_groups = torch.arange(len(tasks)).repeat_interleave(blocks)
    place_groups = block_groups.repeat_interleave(length)
    rank = torch.arange(len(place_groups)) - first_place[place_groups]  # of a place in its group
    by_group = torch.argsort(groups, stable=True)
    order = by_group[first_row[place_groups] + torch.minimum(rank, sizes[place_groups] - 1)]
    real = rank < sizes[place_groups]
    inverse = torch.empty_like(groups)
    inverse[by_group] = real.nonzero().squeeze(1)
    return Groups(tasks, block_groups, length, order, inverse, (~real).nonzero().squeeze(1))


def grouping_pays(groups: Groups, rows: int, width: int) -> bool:
    """Whether factors mixed a group beat activations of `width` skills (or tasks) mixed a row, on a CPU.

    The latter cost 1.6 us a row and skill, forward and backward; gathering costs as much as 3 skills, a group as much
    as 256 rows and skills (1024 rows of 768, r = 16, 2 to 32 skills, 4 to 128 tasks, one thread).
    """
    return width * rows > (1 if groups.order is None else 4) * rows + 256 * len(groups.tasks)


def _block_length(rows: int, groups: int) -> int:
    """The power of two near sqrt(8 rows a group): long blocks pad, short ones copy many factors (2048x768, r = 16)."""
    return 2 ** max(round(math.log2(math.sqrt(8.0 * rows / max(groups, 1)) + 1e-9)), 2)


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor,
    expand: Tensor,
    groups: Groups,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s u E with u = x S, S and E those of a row's group; returns (y, u), all in the groups' places."""
    y = linear(x, weight, bias)
    u = groups.blocks(x) @ groups.of_blocks(shrink)
    groups.blocks(y).baddbmm_(u, groups.of_blocks(expand), alpha=scaling)
    return y, u.flatten(0, 1)


def grouped_shrink(x: Tensor, shrink: Tensor, groups: Groups) -> Tensor:
    """u = x S alone, (P, r)."""
    return torch.bmm(groups.blocks(x), groups.of_blocks(shrink)).flatten(0, 1)


def grouped_reduce(low: Tensor, wide: Tensor, groups: Groups, scaling: float) -> Tensor:
    """s lowᵀ wide over the rows of every group, (U, r, columns), float32 or wider: the gradients of the factors."""
    if groups.padding is not None:
        low = low.index_fill(0, groups.padding, 0.0)
    products = torch.bmm(groups.blocks(low).mT, groups.blocks(wide))
    dtype = torch.promote_types(low.dtype, torch.float32)
    total = torch.zeros(len(groups.tasks), *products.shape[1:], dtype=dtype)
    return total.index_add_(0, groups.groups, products.to(dtype), alpha=scaling)
