"""What the attention kernels share: heads, products over the head size, masked scores, and the host side of a launch.

Heads of at most BLOCK_D columns are WHOLE: their rows are loaded once and kept. Wider ones go in chunks of BLOCK_D
columns, and every product over the head size loads both of its sides in a loop.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attention_problem import Attention
from .configs import Config, select_by_size
from .device import device_traits
from .dropout import dropout_argument
from .launch import dot_precision
from .neighbours import changed
from .tiles import Matrix, dot, load_tile

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(LOG2_E x), and exp2 is one instruction


class Heads(NamedTuple):
    """A tensor (batch, head, row, column) as a kernel argument."""

    pointer: Any
    rows: Any
    columns: Any
    stride_batch: Any
    stride_head: Any
    stride_row: Any
    stride_column: Any


def heads(tensor: Tensor | None) -> Heads | None:
    """The kernel argument of a 4-D tensor. None stays None, and the kernel compiles without it."""
    return None if tensor is None else Heads(tensor, *tensor.shape[2:], *tensor.stride())


def alignment(*tensors: Tensor | None) -> int:
    """8 if all strides but those of 1 are multiples of 8 elements, and so is the head size; otherwise 1.

    Triton looks for multiples of 16. Of a head size such as 72 it would load every element by itself, and spill.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    sides = [side for tensor in given for side in (tensor.shape[3], *tensor.stride()[:3])]
    return 8 if all(tensor.stride(3) == 1 for tensor in given) and all(side % 8 == 0 for side in sides) else 1


def expanded_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Heads | None, bool]:
    """The kernel argument of a mask, expanded and not copied, and whether it has a row for every query.

    One row for all queries, as a mask of padding has, is loaded as a row, and takes few registers.
    """
    if mask is None:
        return None, False
    mask = mask.expand(*q.shape[:3], k.shape[2])
    return heads(mask), mask.shape[2] > 1 and mask.stride(2) != 0


@triton.jit
def aligned(side, ALIGNMENT: tl.constexpr):
    """side, a multiple of ALIGNMENT, in a form that tells the compiler so."""
    return side if ALIGNMENT == 1 else side // ALIGNMENT * ALIGNMENT


@triton.jit
def place_of_queries(queries, columns, n_heads, heads_per_key_head, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr):
    """What a program owns: (block of queries, chunk of the output's columns, batch, head, head of k and v), and the
    first row of the head in (B·H·Sq, Sk). If causal, the last queries have most to do: they come first."""
    n_blocks, n_chunks = tl.cdiv(queries, BLOCK_M), tl.cdiv(columns, BLOCK_O)
    i_block = n_blocks - 1 - tl.program_id(0) % n_blocks
    i_chunk = tl.program_id(0) // n_blocks % n_chunks
    i_row_of_heads = tl.program_id(0) // (n_blocks * n_chunks)
    i_batch, i_head = i_row_of_heads // n_heads, i_row_of_heads % n_heads
    return i_block, i_chunk, i_batch, i_head, i_head // heads_per_key_head, i_row_of_heads.to(tl.int64) * queries


@triton.jit
def head(a, i_batch, i_head, ALIGNMENT: tl.constexpr):
    """The Matrix of one head, its strides and columns multiples of ALIGNMENT."""
    stride_batch, stride_head = aligned(a.stride_batch, ALIGNMENT), aligned(a.stride_head, ALIGNMENT)
    stride_row, columns = aligned(a.stride_row, ALIGNMENT), aligned(a.columns, ALIGNMENT)
    o_head = i_batch.to(tl.int64) * stride_batch + i_head.to(tl.int64) * stride_head
    return Matrix(a.pointer + o_head, a.rows, columns, stride_row, a.stride_column)


@triton.jit
def rows_of(a, o_row, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows o_row of a if BLOCK_D columns are the whole of them; otherwise just o_row, and nothing is loaded."""
    if WHOLE:
        return load_tile(a, o_row, tl.arange(0, BLOCK_D))
    else:
        return o_row


@triton.jit
def columns_of(b_rows, a, o_row, o_column, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr):
    """a[o_row, o_column] of BLOCK_O columns, which b_rows = `rows_of` holds already if they are all."""
    if WHOLE and BLOCK_D == BLOCK_O:
        return b_rows
    else:
        return load_tile(a, o_row, o_column)


@triton.jit
def row_products(
    b_product, b_a, a, o_a, b_b, b, o_b, WHOLE: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """product + a[o_a] b[o_b]ᵀ, of what `rows_of` gave for either: in one dot, or chunk by chunk."""
    if WHOLE:
        b_product = dot(b_a, tl.trans(b_b), b_product, PRECISION)
    else:
        for d in tl.range(0, a.columns, BLOCK_D, disable_licm=True):
            o_d = d + tl.arange(0, BLOCK_D)
            b_chunk = load_tile(b, o_b, o_d)
            b_product = dot(load_tile(a, o_a, o_d), tl.trans(b_chunk), b_product, PRECISION)
    return b_product


@triton.jit
def masked_scores(
    b_s, o_query, o_key, n_keys, mask, i_batch, i_head, scale, CAUSAL: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """LOG2_E (scale S + mask), −∞ where a query does not see a key. o_query and o_key broadcast to S or to Sᵀ.

    With MASK_ROWS the mask has a row for every query, otherwise one for all.
    """
    m_seen = o_key < n_keys
    if CAUSAL:
        m_seen = m_seen & (o_key <= o_query)
    b_s *= scale * LOG2_E
    if mask is not None:
        o_mask, m_mask = o_key.to(tl.int64) * mask.stride_column, o_key < n_keys
        if MASK_ROWS:
            o_mask, m_mask = o_mask + o_query.to(tl.int64) * mask.stride_row, m_mask & (o_query < mask.rows)
        p_mask = mask.pointer + i_batch.to(tl.int64) * mask.stride_batch + i_head.to(tl.int64) * mask.stride_head
        b_mask = tl.load(p_mask + o_mask, mask=m_mask, other=0)
        if mask.pointer.dtype.element_ty == tl.int1:
            m_seen = m_seen & (b_mask != 0)
        else:
            b_s += b_mask.to(tl.float32) * LOG2_E
    return tl.where(m_seen, b_s, float("-inf"))


def attention_config(op: str, problem: Attention, change: str = "") -> Config:
    """What the table has for these heads, and for a mask with a row for every query or none such, with a change of
    `neighbours`."""
    itemsize, architecture = problem.q.element_size(), device_traits(problem.q.device).architecture
    row = select_by_size(
        op,
        size=max(problem.q.shape[3], problem.v.shape[3]),
        itemsize=itemsize,
        architecture=architecture,
        dropout=expanded_mask(problem.mask, problem.q, problem.k)[1],
    )
    return changed(row, change, itemsize, architecture)


def shared_arguments(problem: Attention, config: Config) -> dict[str, Any]:
    """The arguments that forward and backward have in common."""
    q, k, v = problem[:3]
    mask_argument, mask_rows = expanded_mask(problem.mask, q, k)
    size = max(16, triton.next_power_of_2(max(q.shape[3], v.shape[3])))
    return {
        "q": heads(q),
        "k": heads(k),
        "v": heads(v),
        "mask": mask_argument,
        "MASK_ROWS": mask_rows,
        "n_heads": q.shape[1],
        "heads_per_key_head": q.shape[1] // k.shape[1],
        "scale": float(problem.scale),
        "dropout": dropout_argument(problem.dropout_p, problem.seed),
        "CAUSAL": problem.causal,
        "WHOLE": size <= config.block_k,
        "PRECISION": dot_precision(q.dtype),
        "BLOCK_D": min(size, config.block_k),
        "BLOCK_O": min(size, config.block_r),
    }
