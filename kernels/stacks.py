"""What the kernels of routing share: stacks of matrices, rows in the order of their groups, and the walk over groups.

Rows of one group need not be neighbours. They are gathered through the sort order as they are loaded and stored, so
that no permuted copy of an activation exists. A tile of rows then holds rows of one group, or of a few where groups
meet; a kernel walks over those. Every group adds one such meeting, whatever the sizes of the groups: no row is padded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Stack(NamedTuple):
    """A 3-D tensor as a kernel argument: matrices (rows, columns), one a group."""

    pointer: Any
    rows: Any
    columns: Any
    stride_group: Any
    stride_row: Any
    stride_column: Any


class Segments(NamedTuple):
    """Rows in the order of their groups, all int32 on the device; the same tensors serve every layer.

    Place p holds row order[p], of group groups[p]; the places of group t are first[t] to first[t + 1].
    """

    order: Any
    groups: Any
    first: Any


def stack(tensor: Tensor | None) -> Stack | None:
    """The kernel argument of a 3-D tensor. None stays None, and the kernel compiles without it."""
    return None if tensor is None else Stack(tensor, *tensor.shape[1:], *tensor.stride())


def group_rows(group_ids: Tensor, n_groups: int, repeats: int, static: bool) -> Segments:
    """The segments of rows whose groups are `group_ids` (E,), each id for `repeats` rows in succession.

    Made on the device, in sizes the host knows: `static` makes no difference here.
    """
    rows = group_ids.unsqueeze(1).expand(-1, repeats).reshape(-1).to(torch.int32)
    groups, order = rows.sort(stable=True)
    bounds = torch.arange(n_groups + 1, dtype=torch.int32, device=rows.device)
    return Segments(order.to(torch.int32), groups, torch.searchsorted(groups, bounds, out_int32=True))


@triton.jit
def load_from(a, i_group, o_row, o_column):
    """a[i_group, o_row, o_column] (rows, columns), zero outside."""
    m_tile = (o_row < a.rows)[:, None] & (o_column < a.columns)[None, :]
    o_tile = o_row.to(tl.int64)[:, None] * a.stride_row + o_column.to(tl.int64)[None, :] * a.stride_column
    return tl.load(a.pointer + tl.cast(i_group, tl.int64) * a.stride_group + o_tile, mask=m_tile, other=0.0)


@triton.jit
def store_to(a, b_tile, i_group, o_row, o_column):
    """a[i_group, o_row, o_column] = tile, inside; rounds to a's dtype."""
    m_tile = (o_row < a.rows)[:, None] & (o_column < a.columns)[None, :]
    o_tile = o_row.to(tl.int64)[:, None] * a.stride_row + o_column.to(tl.int64)[None, :] * a.stride_column
    p_tile = a.pointer + tl.cast(i_group, tl.int64) * a.stride_group + o_tile
    tl.store(p_tile, b_tile.to(a.pointer.dtype.element_ty), mask=m_tile)


@triton.jit
def rows_at(segments, o_place, ROWS):
    """The rows at places, ROWS (outside every matrix) for places past the last."""
    return tl.load(segments.order + o_place, mask=o_place < ROWS, other=ROWS)


@triton.jit
def group_at(segments, place, end):
    """The group at a place, and the first place past its rows, at most `end`."""
    i_group = tl.load(segments.groups + place)
    return i_group, min(tl.load(segments.first + i_group + 1), end)
