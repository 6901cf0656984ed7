"""The dropout mask as a pure function of (seed, row, column), recomputed wherever a kernel needs it.

The bits are those of `linlora.reference.keep_mask`: element (i, j) is kept when 31 bits of
``mix(mix(i·φ + seed) + j·φ)`` reach ``threshold`` = round(p·2³¹), all arithmetic wrapping in 32 bits. A mask is never
stored, so forward, backward and both streams of an op agree without reading a byte of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from linlora.reference import dropout_threshold

_GOLDEN = tl.constexpr(0x9E3779B1)
_MIX_1 = tl.constexpr(0x85EBCA6B)
_MIX_2 = tl.constexpr(0xC2B2AE35)


class Dropout(NamedTuple):
    """What a kernel needs of dropout; None in its place compiles the kernel without."""

    seed: Any  # 0-d int64 tensor, read on the device
    threshold: Any
    inverse_keep: Any  # 1 / (1 - p)


def dropout_argument(p: float, seed: Tensor | None) -> Dropout | None:
    """The kernels' dropout argument of probability p, checked by `checks.check_dropout`."""
    return None if p == 0.0 else Dropout(seed, dropout_threshold(p), 1.0 / (1.0 - p))


@triton.jit
def _mix(h):
    """The finalizer of MurmurHash3 on uint32."""
    h = h ^ (h >> 16)
    h = h * _MIX_1
    h = h ^ (h >> 13)
    h = h * _MIX_2
    return h ^ (h >> 16)


@triton.jit
def keep_mask(o_row, o_column, dropout):
    """The mask (rows, columns) of the elements at o_row × o_column that survive."""
    seed = tl.load(dropout.seed).to(tl.uint32)
    row_key = _mix(o_row.to(tl.uint32) * _GOLDEN + seed)
    column_key = o_column.to(tl.uint32) * _GOLDEN
    bits = _mix(row_key[:, None] + column_key[None, :]) & 0x7FFFFFFF
    return bits.to(tl.int32) >= dropout.threshold


@triton.jit
def drop(b_x, o_row, o_column, dropout):
    """mask/(1-p) ⊙ x, rounded to the dtype of x; x itself without dropout."""
    if dropout is not None:
        b_kept = b_x.to(tl.float32) * dropout.inverse_keep
        b_x = tl.where(keep_mask(o_row, o_column, dropout), b_kept, 0.0).to(b_x.dtype)
    return b_x
