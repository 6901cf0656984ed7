"""What the kernels share: matrices, loads, dots and the two low-rank steps, each a few lines of Triton.

Names inside kernels: a bare word (``x``, ``shrink``) is a `Matrix`, ``b_`` a block in registers, ``p_`` a pointer,
``d_`` a tensor descriptor, ``o_`` offsets, ``m_`` a mask, ``i_`` an index. Offsets are widened to 64 bits before they
meet a stride, so tensors may have more than 2³¹ elements, and any strides.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_mask

# The interpreter holds bf16 as raw 16-bit integers, and its dot multiplies those. True only there.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Matrix(NamedTuple):
    """A 2-D tensor as a kernel argument. A stride of one is a compile-time constant, like any integer argument."""

    pointer: Any
    rows: Any
    columns: Any
    stride_row: Any
    stride_column: Any


def matrix(tensor: Tensor | None) -> Matrix | None:
    """The kernel argument of a 2-D tensor. None stays None, and the kernel compiles without it."""
    return None if tensor is None else Matrix(tensor, *tensor.shape, *tensor.stride())


class Scaling(NamedTuple):
    """s as two numbers, of u and c and of the factors that they meet, so that neither overflows in float16 by it."""

    low: Any  # at most 1
    factor: Any  # a power of two, 1 for s up to 1: exact


def scaling_argument(scaling: Any) -> Scaling:
    """The kernels' scaling argument, of any number.

    >>> scaling_argument(24.0)
    Scaling(low=0.75, factor=32.0)
    """
    scaling = float(scaling)
    if abs(scaling) <= 1.0:
        return Scaling(scaling, 1.0)
    mantissa, exponent = math.frexp(scaling)
    return Scaling(mantissa, 2.0**exponent)


@triton.jit
def grouped_tile(i_tile, n_row_tiles, n_column_tiles, GROUP_M: tl.constexpr):
    """(row, column) of a tile, walking the columns of GROUP_M rows at a time so that both operands stay in L2."""
    first_row = i_tile // (GROUP_M * n_column_tiles) * GROUP_M
    n_rows = min(n_row_tiles - first_row, GROUP_M)
    i_local = i_tile % (GROUP_M * n_column_tiles)
    return first_row + i_local % n_rows, i_local // n_rows


@triton.jit
def dot(b_a, b_b, b_accumulator, PRECISION: tl.constexpr):
    """accumulator + a b in fp32."""
    if INTERPRETED and b_a.dtype == tl.bfloat16:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_accumulator, input_precision=PRECISION)


@triton.jit
def load_tile(a, o_row, o_column, PAST_L1: tl.constexpr = False):
    """a[o_row, o_column] (rows, columns), zero outside a. PAST_L1 sees what other programs of the launch wrote."""
    m_tile = (o_row < a.rows)[:, None] & (o_column < a.columns)[None, :]
    o_tile = o_row.to(tl.int64)[:, None] * a.stride_row + o_column.to(tl.int64)[None, :] * a.stride_column
    return tl.load(a.pointer + o_tile, mask=m_tile, other=0.0, cache_modifier=".cg" if PAST_L1 else "")


@triton.jit
def load_transposed(a, o_row, o_column):
    """a[o_row, o_column]ᵀ (columns, rows), zero outside a."""
    m_tile = (o_column < a.columns)[:, None] & (o_row < a.rows)[None, :]
    o_tile = o_column.to(tl.int64)[:, None] * a.stride_column + o_row.to(tl.int64)[None, :] * a.stride_row
    return tl.load(a.pointer + o_tile, mask=m_tile, other=0.0)


@triton.jit
def store_tile(a, b_tile, o_row, o_column):
    """a[o_row, o_column] = tile, inside a; rounds to a's dtype, the only rounding an output sees."""
    m_tile = (o_row < a.rows)[:, None] & (o_column < a.columns)[None, :]
    o_tile = o_row.to(tl.int64)[:, None] * a.stride_row + o_column.to(tl.int64)[None, :] * a.stride_column
    tl.store(a.pointer + o_tile, b_tile.to(a.pointer.dtype.element_ty), mask=m_tile)


@triton.jit
def columns_of_split(K, i_split, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(first, end) of the columns of x that a program sums over: all of them, or whole steps, as equal as they are."""
    if SPLITS == 1:
        return 0, K
    else:
        length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS) * BLOCK_K
        return i_split * length, min((i_split + 1) * length, K)


@triton.jit
def part_of(parts, i_part, first_column, a):
    """The partial sums of a in parts (splits, rows, columns), given as the first of them, from a column on. They are of
    16 rows, and of no more columns than multiprocessors have tiles: 32 bits hold their offsets."""
    offset = i_part * parts.rows * parts.stride_row + first_column
    return Matrix(parts.pointer + offset, a.rows, a.columns, parts.stride_row, parts.stride_column)


@triton.jit
def store_sum(a, parts, first_column, o_row, o_column, SPLITS: tl.constexpr):
    """a[o_row, o_column] = the sum of the parts that programs of this launch have stored, in their order."""
    b_sum = load_tile(part_of(parts, 0, first_column, a), o_row, o_column, PAST_L1=True)
    for i_part in tl.static_range(1, SPLITS):
        b_sum += load_tile(part_of(parts, i_part, first_column, a), o_row, o_column, PAST_L1=True)
    store_tile(a, b_sum, o_row, o_column)


@triton.jit
def store_low_sum(a, parts, first_column, o_row, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr):
    """The same for all columns of a, which may be None."""
    if a is not None:
        for r in range(0, a.columns, BLOCK_R):
            store_sum(a, parts, first_column, o_row, r + tl.arange(0, BLOCK_R), SPLITS)


@triton.jit
def load_vector(p_vector, o_element, SIZE):
    """vector[o_element] of a contiguous vector (SIZE,), in fp32, zero outside it."""
    return tl.load(p_vector + o_element, mask=o_element < SIZE, other=0.0).to(tl.float32)


@triton.jit
def store_vector(p_vector, b_vector, o_element, SIZE):
    """vector[o_element] = block, inside a contiguous fp32 vector (SIZE,)."""
    tl.store(p_vector + o_element, b_vector, mask=o_element < SIZE)


@triton.jit
def accumulate_shrink(b_u, b_x, factor, o_r, o_k, PRECISION: tl.constexpr):
    """One K step of u = x factorᵀ, factor (R, K)."""
    b_factor = load_transposed(factor, o_r, o_k)
    return dot(b_x, b_factor.to(b_x.dtype), b_u, PRECISION)


@triton.jit
def accumulate_expand(b_y, b_u, factor, scaling, o_n, o_r, PRECISION: tl.constexpr):
    """y + s u factorᵀ, factor (N, R) and u in the dtype of the dots, scaling.low included."""
    b_factor = load_transposed(factor, o_n, o_r).to(tl.float32) * scaling.factor
    return dot(b_u, b_factor.to(b_u.dtype), b_y, PRECISION)


@triton.jit
def add_masked(b_y, b_update, o_m, o_n, dropout):
    """y + mask/(1-p) ⊙ update."""
    return b_y + tl.where(keep_mask(o_m, o_n, dropout), b_update * dropout.inverse_keep, 0.0)


@triton.jit
def low_rank_update(
    b_y,
    b_u,
    u_factor,
    b_v,
    v_factor,
    scaling,
    o_m,
    o_n,
    o_r,
    dropout,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y + s [ u u_factorᵀ + v v_factorᵀ ], factors (N, R) and a term with no factor left out.

    s multiplies the fp32 u and v before their only rounding, and the factors exactly (see `Scaling`), so that the
    update needs no accumulator of its own.

    MASKED is dropout seen from its output, as the backward of a masked shrink needs it: y + mask/(1-p) ⊙ s [ … ].
    """
    b_update = tl.zeros_like(b_y) if MASKED else b_y
    if u_factor is not None:
        b_update = accumulate_expand(b_update, (b_u * scaling.low).to(DTYPE), u_factor, scaling, o_n, o_r, PRECISION)
    if v_factor is not None:
        b_update = accumulate_expand(b_update, (b_v * scaling.low).to(DTYPE), v_factor, scaling, o_n, o_r, PRECISION)
    return add_masked(b_y, b_update, o_m, o_n, dropout) if MASKED else b_update


@triton.jit
def bias_tile(p_bias, o_n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The accumulator an output tile starts from: a contiguous bias (N,) in every row, or zero without one."""
    b_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if p_bias is not None:
        b_y += load_vector(p_bias, o_n, N)[None, :]
    return b_y
