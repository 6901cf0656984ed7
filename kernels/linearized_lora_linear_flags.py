"""`lora_linear` of one stream beyond small M: persistent programs that share u and c through flags, in one launch.

    u = x' S0ᵀ      c = x' (S0 + dS)ᵀ      y = x Wᵀ + b + s [ c E0ᵀ + u dEᵀ ]                     (see `lora_linear`)

[S0; dS] counts as more columns of tiles, BLOCK_R ranks each. A program draws tiles from a ticket counter, in groups of
GROUP_M rows:

                    shrink     output tiles, column after column
                   ┌──────┐  ┌─────────┬─────────┬───
    group   row 0  │  0   │  │    2    │    4    │  …        output tile: whole loop over K, then wait for the row's
            row 1  │  1   │  │    3    │    5    │           flag, add s [ … ] from u and c, store y
                   └──────┘  └─────────┴─────────┴───

The shrink costs 2r / N instead of the recompute's 2r / BLOCK_N, and waits hide behind loops over K. The protocol:

* A shrink tile stores s u and s c (by `Scaling.low`), then counts itself in the flag of its row (release). An output
  tile waits (acquire) until all shrink tiles of the row are counted, and counts itself when it has read. The last one
  of the row sets the flag back to 0; the program that draws the last ticket of all sets the counter back to 0. So the
  buffer is all zeros between launches, with no epoch and no memset.
* A tile waits only on tiles of smaller tickets, which programs that already run have drawn. Progress therefore does
  not depend on how many programs are resident, or on what else runs on the GPU.

x, W and y go through tensor descriptors (TMA), hence the conditions of `describable`; a transposed weight is read
through the descriptor of its contiguous transpose.

Kept for backward: x, and u, c in x's dtype (M·r each).
Floor: 2MNK + 4Mr(K + N) FLOPs; MK + NK + MN + 2r(K + N) + 2Mr elements, each moved once; the shared s u and s c
are 4Mr more.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Config
from .counters import counters
from .device import device_traits
from .dropout import drop
from .launch import Launch, block_r, layer_arguments
from .problem import LoraLinear, Result
from .tiles import (
    accumulate_expand,
    accumulate_shrink,
    add_masked,
    bias_tile,
    dot,
    grouped_tile,
    load_tile,
    matrix,
    store_tile,
)


class LowRank(NamedTuple):
    """The factors and their products with x: u and c to keep, None if not wanted, s u and s c to share."""

    shrink: Any
    d_shrink: Any
    expand: Any
    d_expand: Any
    u: Any
    c: Any
    su: Any
    sc: Any
    scaling: Any
    dropout: Any


@triton.jit
def shrink_tile(
    i_m,
    i_r,
    d_x,
    low,
    p_flag,
    K,
    MASK_UPDATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_R columns of u and c, released by the row's flag."""
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    b_u = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    b_v = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, flatten=False):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = d_x.load([i_m * BLOCK_M, k])
        if not MASK_UPDATE:
            b_x = drop(b_x, o_m, o_k, low.dropout)
        b_u = accumulate_shrink(b_u, b_x, low.shrink, o_r, o_k, PRECISION)
        if low.d_shrink is not None:
            b_v = accumulate_shrink(b_v, b_x, low.d_shrink, o_r, o_k, PRECISION)
    if low.u is not None:
        store_tile(low.u, b_u, o_m, o_r)
    if low.c is not None:
        store_tile(low.c, b_u + b_v, o_m, o_r)
    store_tile(low.su, b_u * low.scaling.low, o_m, o_r)
    if low.d_shrink is not None:
        store_tile(low.sc, (b_u + b_v) * low.scaling.low, o_m, o_r)
    tl.debug_barrier()  # every thread has stored before one of them releases
    tl.atomic_add(p_flag, 1, sem="release")


@triton.jit
def output_tile(
    i_m,
    i_n,
    d_x,
    d_weight,
    p_bias,
    d_y,
    low,
    p_flag,
    N,
    K,
    n_shrink_tiles,
    n_output_tiles,
    TRANSPOSED_WEIGHT: tl.constexpr,
    MASK_UPDATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of y. It waits for the row's u and c only after its own loop over K."""
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_y = bias_tile(p_bias, o_n, N, BLOCK_M, BLOCK_N)
    for k in tl.range(0, K, BLOCK_K, flatten=False):
        b_x = d_x.load([i_m * BLOCK_M, k])
        b_weight = d_weight.load([k, i_n * BLOCK_N]) if TRANSPOSED_WEIGHT else d_weight.load([i_n * BLOCK_N, k]).T
        b_y = dot(b_x, b_weight, b_y, PRECISION)

    while tl.atomic_add(p_flag, 0, sem="acquire") < n_shrink_tiles:
        pass
    b_update = tl.zeros_like(b_y) if MASK_UPDATE else b_y
    for r in tl.range(0, low.d_expand.columns, BLOCK_R, num_stages=2):  # few ranks at a time: y holds most registers
        o_r = r + tl.arange(0, BLOCK_R)
        b_su = load_tile(low.su, o_m, o_r, PAST_L1=True)
        b_update = accumulate_expand(b_update, b_su, low.d_expand, low.scaling, o_n, o_r, PRECISION)
        if low.expand is not None:
            b_sc = load_tile(low.sc, o_m, o_r, PAST_L1=True)
            b_update = accumulate_expand(b_update, b_sc, low.expand, low.scaling, o_n, o_r, PRECISION)
    b_y = add_masked(b_y, b_update, o_m, o_n, low.dropout) if MASK_UPDATE else b_update
    d_y.store([i_m * BLOCK_M, i_n * BLOCK_N], b_y.to(d_y.dtype))
    if tl.atomic_add(p_flag, 1, sem="relaxed") == n_shrink_tiles + n_output_tiles - 1:  # the last tile of the row
        tl.atomic_xchg(p_flag, 0, sem="relaxed")


@triton.jit
def linearized_lora_linear_flags_kernel(
    d_x,
    d_weight,
    p_bias,
    shrink,
    d_shrink,
    expand,
    d_expand,
    d_y,
    u,
    c,
    su,
    sc,
    p_counters,
    M,
    N,
    K,
    R,
    scaling,
    dropout,
    TRANSPOSED_WEIGHT: tl.constexpr,
    MASK_UPDATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    FEW_RANKS: tl.constexpr = min(BLOCK_R, 32)
    p_ticket, p_flags = p_counters, p_counters + 1
    low = LowRank(shrink, d_shrink, expand, d_expand, u, c, su, sc, scaling, dropout)
    n_row_tiles, n_shrink_tiles, n_output_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(R, BLOCK_R), tl.cdiv(N, BLOCK_N)
    n_tiles = n_row_tiles * (n_shrink_tiles + n_output_tiles)
    i_tile = tl.atomic_add(p_ticket, 1, sem="relaxed")
    while i_tile < n_tiles:
        i_m, i_column = grouped_tile(i_tile, n_row_tiles, n_shrink_tiles + n_output_tiles, GROUP_M)
        p_flag = p_flags + i_m
        if i_column < n_shrink_tiles:
            shrink_tile(i_m, i_column, d_x, low, p_flag, K, MASK_UPDATE, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R)
        else:
            output_tile(
                i_m, i_column - n_shrink_tiles, d_x, d_weight, p_bias, d_y, low, p_flag, N, K,
                n_shrink_tiles, n_output_tiles, TRANSPOSED_WEIGHT, MASK_UPDATE, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K, FEW_RANKS,
            )  # fmt: skip
        i_tile = tl.atomic_add(p_ticket, 1, sem="relaxed")
    if i_tile == n_tiles + tl.num_programs(0) - 1:  # every program has drawn its last ticket
        tl.atomic_xchg(p_ticket, 0, sem="relaxed")


def describable(x: Tensor, weight: Tensor) -> bool:
    """Whether tensor descriptors can read x and write y by rows, and read the weight by rows or by columns."""
    return (
        _rows_align(x)
        and (_rows_align(weight) or _rows_align(weight.t()))
        and weight.shape[0] * weight.element_size() % 16 == 0
    )


def _rows_align(tensor: Tensor) -> bool:
    """Rows that are contiguous, not empty, do not overlap, and start at multiples of 16 bytes."""
    (rows, columns), (stride, one) = tensor.shape, tensor.stride()
    apart = one == 1 and stride >= columns > 0 < rows
    return apart and stride * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0


def launch(problem: LoraLinear, result: Result, config: Config) -> Launch:
    """The launch of the flags design, which fills the result."""
    x, weight = problem.x, problem.weight
    if problem.two_streams:
        raise ValueError("the flags design computes one stream; two need a configuration of the recompute design")
    if not describable(x, weight):
        raise ValueError("the flags design needs 16-byte aligned rows: of x, of y, and of the weight or its transpose")
    (m, k), n, rank = x.shape, weight.shape[0], problem.rank
    transposed_weight = not _rows_align(weight)
    weight_shape, weight_strides, weight_block = tuple(weight.shape), weight.stride(), [config.block_n, config.block_k]
    if transposed_weight:
        weight_shape, weight_strides, weight_block = (k, n), weight.stride()[::-1], [config.block_k, config.block_n]
    row_tiles = triton.cdiv(m, config.block_m)
    tiles = row_tiles * (triton.cdiv(rank, block_r(rank, config)) + triton.cdiv(n, config.block_n))
    programs = config.programs or device_traits(x.device).multiprocessors
    arguments = layer_arguments(problem, result, config)
    for described in ("x", "weight", "y", "ONE_RANK_BLOCK"):
        del arguments[described]
    return Launch(
        kernel=linearized_lora_linear_flags_kernel,
        grid=(min(programs, tiles),),
        arguments={
            "d_x": TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            "d_weight": TensorDescriptor(weight, weight_shape, weight_strides, weight_block),
            "d_y": TensorDescriptor.from_tensor(result.y, [config.block_m, config.block_n]),
            "su": matrix(x.new_empty(m, rank)),
            "sc": matrix(x.new_empty(m, rank) if problem.is_pair else None),
            "p_counters": counters(x.device, 1 + row_tiles),
            "M": m,
            "N": n,
            "K": k,
            "R": rank,
            "TRANSPOSED_WEIGHT": transposed_weight,
            **arguments,
        },
        config=config,
    )
