"""lora_linear: one LoRA layer with its tangent in one launch, both in one stream or each in its own.

    one stream     u = x' S0ᵀ    c = x' (S0 + dS)ᵀ          y   = x Wᵀ + b + s [ c E0ᵀ + u dEᵀ ]
    two streams    u = x' S0ᵀ    c = x' dSᵀ + x_t' S0ᵀ      y   = x Wᵀ + b + s u E0ᵀ
                                                            y_t = x_t Wᵀ   + s [ c E0ᵀ + u dEᵀ ]
    short form (B0 = 0): no dS, no E0, no c

    x, x_t (M, K)   W (N, K)   b (N,)   shrink S0, d_shrink dS (r, K)   expand E0, d_expand dE (N, r)
    y, y_t (M, N)   u, c (M, r)         x', x_t' = mask/(1-p) ⊙ x, x_t: one mask for both streams

Forward and backward are one kernel, for the operator is self-adjoint up to transposes:

    forward    (S0, dS, E0, dE) = (A0, dA, B0, dB)          weight W,  bias b
    backward   (S0, dS, E0, dE) = (B0ᵀ, dBᵀ, A0ᵀ, dAᵀ)      weight Wᵀ, no bias; of two streams (g_t, g) gives (dx_t, dx)

The dropout mask lies over the shrink's input in the forward (x'; the frozen product sees x) and over the updates
s [ … ] in the backward: adjoint. An input that had no tangent asks for no y in its backward: not `primal`. Two streams
without x_t: it is zero, y_t is the update alone.

One program computes one tile of y, and the same tile of y_t: every tile of W is loaded once for both. A tile of x that
is loaded feeds W and both shrinks, so u and c cost each column of tiles 2r / BLOCK_N more (two streams:
3r / 2·BLOCK_N). The first column stores them. Ranks go in blocks of BLOCK_R (64):

                K →                      BLOCK_N         BLOCK_R      after each loop over K:
           ┌─────┬───                  ┌──────────┐       ┌───┐
   BLOCK_M │  x  │ …   ·  Wᵀ, S0ᵀ, dSᵀ │    y     │       │ u │         y   += s c E0ᵀ + s u dEᵀ
           ├─────┼───      │           ├──────────┤       ├───┤         (two streams: see above)
   BLOCK_M │ x_t │ …   ·  Wᵀ, S0ᵀ      │   y_t    │       │ c │
           └─────┴───                  └──────────┘       └───┘

The first block is computed in the loop over K that computes the frozen products. Every further one has a loop over K
of its own before that one, without W, which reads the same rows of x and x_t (from L2, all but the first time) and its
own rows of S0 and dS: ceil(r / BLOCK_R) times in all. The short form reads x_t once at every rank. Beyond small M
`linearized_lora_linear_flags` computes u and c of one stream once instead, where the tensors' alignment allows.

With few rows several programs share a tile (`configs.split`): each computes all of the above over a part of K, bias in
the first alone, and stores partial sums of y, y_t, u and c in fp32. The last one, by a counter of the tile that it sets
back to 0, adds them in the order of the parts: the same bits whoever is last.

Kept for backward: x, x_t, and u, c in x's dtype (M·r each).
Floor, one stream: 2MNK + 4Mr(K + N) FLOPs; MK + NK + MN + 2r(K + N) + 2Mr elements, each moved once. Two streams: twice
the frozen product's FLOPs, 6Mr(K + N), and twice the elements of x and y.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import linearized_lora_linear_flags as flags
from . import repeated
from .checks import check_served
from .configs import Config
from .dropout import drop
from .launch import Launch, configuration, layer_arguments, split_arguments
from .packing import empty
from .problem import LoraLinear, Result
from .tiles import (
    accumulate_shrink,
    add_masked,
    bias_tile,
    columns_of_split,
    dot,
    grouped_tile,
    load_tile,
    load_transposed,
    low_rank_update,
    matrix,
    part_of,
    store_low_sum,
    store_sum,
    store_tile,
)


class Layer(NamedTuple):
    """The matrices of a program's tile, None what there is not; u and c may be partial sums."""

    x: Any
    x_tangent: Any
    shrink: Any
    d_shrink: Any
    expand: Any
    d_expand: Any
    y: Any
    y_tangent: Any
    u: Any
    c: Any
    scaling: Any
    dropout: Any


@triton.jit
def rank_block(
    b_y,
    b_y_tangent,
    layer,
    weight,
    o_m,
    o_n,
    r,
    first_k,
    end_k,
    is_first_column,
    MASK_UPDATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y and y_t + the updates of BLOCK_R ranks from r on, in one loop over K.

    The loop also adds the frozen products x Wᵀ and x_t Wᵀ. With no weight, y and y_t are sums of updates alone, and
    all of them is masked later. A stream that is not wanted stays as it is.
    """
    x, x_tangent = layer.x, layer.x_tangent
    DTYPE: tl.constexpr = x.pointer.dtype.element_ty
    MASKED: tl.constexpr = MASK_UPDATE and weight is not None
    TWO_STREAMS: tl.constexpr = layer.y_tangent is not None
    o_r = r + tl.arange(0, BLOCK_R)
    b_u = tl.zeros((b_y.shape[0], BLOCK_R), dtype=tl.float32)
    b_c = tl.zeros((b_y.shape[0], BLOCK_R), dtype=tl.float32)
    for k in range(first_k, end_k, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = load_tile(x, o_m, o_k)
        if weight is not None:
            if layer.y is not None or x_tangent is not None:
                b_weight = load_transposed(weight, o_n, o_k)
            if layer.y is not None:
                b_y = dot(b_x, b_weight, b_y, PRECISION)
        if not MASK_UPDATE:
            b_x = drop(b_x, o_m, o_k, layer.dropout)
        b_u = accumulate_shrink(b_u, b_x, layer.shrink, o_r, o_k, PRECISION)
        if layer.d_shrink is not None:
            b_c = accumulate_shrink(b_c, b_x, layer.d_shrink, o_r, o_k, PRECISION)
        if x_tangent is not None and (weight is not None or layer.expand is not None):
            b_x_tangent = load_tile(x_tangent, o_m, o_k)
            if weight is not None:
                b_y_tangent = dot(b_x_tangent, b_weight, b_y_tangent, PRECISION)
            if layer.expand is not None:
                if not MASK_UPDATE:
                    b_x_tangent = drop(b_x_tangent, o_m, o_k, layer.dropout)
                b_c = accumulate_shrink(b_c, b_x_tangent, layer.shrink, o_r, o_k, PRECISION)
    if not TWO_STREAMS:
        b_c += b_u

    if is_first_column:
        if layer.u is not None:
            store_tile(layer.u, b_u, o_m, o_r)
        if layer.c is not None:
            store_tile(layer.c, b_c, o_m, o_r)
    if TWO_STREAMS:
        if layer.y is not None and layer.expand is not None:  # s u E0ᵀ
            b_y = low_rank_update(
                b_y, b_u, layer.expand, b_c, None, layer.scaling, o_m, o_n, o_r, layer.dropout, MASKED, DTYPE, PRECISION
            )
        b_y_tangent = low_rank_update(
            b_y_tangent, b_u, layer.d_expand, b_c, layer.expand, layer.scaling, o_m, o_n, o_r, layer.dropout,
            MASKED, DTYPE, PRECISION,
        )  # fmt: skip
    else:
        b_y = low_rank_update(
            b_y, b_u, layer.d_expand, b_c, layer.expand, layer.scaling, o_m, o_n, o_r, layer.dropout,
            MASKED, DTYPE, PRECISION,
        )  # fmt: skip
    return b_y, b_y_tangent


@triton.jit
def lora_linear_kernel(
    x,
    x_tangent,
    weight,
    p_bias,
    shrink,
    d_shrink,
    expand,
    d_expand,
    y,
    y_tangent,
    u,
    c,
    parts,
    p_counters,
    scaling,
    dropout,
    MASK_UPDATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_RANK_BLOCK: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    n_row_tiles, n_tiles = tl.cdiv(x.rows, BLOCK_M), tl.num_programs(0) // SPLITS
    i_tile, i_split = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    i_m, i_n = grouped_tile(i_tile, n_row_tiles, n_tiles // n_row_tiles, GROUP_M)
    first_k, end_k = columns_of_split(x.columns, i_split, SPLITS, BLOCK_K)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)

    b_y = bias_tile(p_bias, o_n, weight.rows, BLOCK_M, BLOCK_N)
    b_y_tangent = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Where u, and after it c, begin in a row of partial sums: behind y, and y_t where there are two streams.
    o_u = weight.rows if y_tangent is None else 2 * weight.rows
    u_or_part, c_or_part = u, c
    if SPLITS > 1:
        b_y = tl.where(i_split == 0, b_y, 0.0)
        if u is not None:
            u_or_part = part_of(parts, i_split, o_u, u)
        if c is not None:
            c_or_part = part_of(parts, i_split, o_u + d_expand.columns, c)
    layer = Layer(
        x, x_tangent, shrink, d_shrink, expand, d_expand, y, y_tangent, u_or_part, c_or_part, scaling, dropout
    )
    # These come first and keep their invariants to themselves: addresses that are hoisted, or shared with the loop
    # over W, would hold registers through all of it, and spill.
    if not ONE_RANK_BLOCK:
        b_update = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r in tl.range(BLOCK_R, d_expand.columns, BLOCK_R, disable_licm=True):
            b_update, b_y_tangent = rank_block(
                b_update, b_y_tangent, layer, None, o_m, o_n, r, first_k, end_k, i_n == 0,
                MASK_UPDATE, PRECISION, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        if MASK_UPDATE:
            b_y = add_masked(b_y, b_update, o_m, o_n, dropout)
            b_y_tangent = add_masked(tl.zeros_like(b_y_tangent), b_y_tangent, o_m, o_n, dropout)
        else:
            b_y += b_update
    b_y, b_y_tangent = rank_block(
        b_y, b_y_tangent, layer, weight, o_m, o_n, 0, first_k, end_k, i_n == 0,
        MASK_UPDATE, PRECISION, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if SPLITS == 1:
        if y is not None:
            store_tile(y, b_y, o_m, o_n)
        if y_tangent is not None:
            store_tile(y_tangent, b_y_tangent, o_m, o_n)
    else:
        if y is not None:
            store_tile(part_of(parts, i_split, 0, y), b_y, o_m, o_n)
        if y_tangent is not None:
            store_tile(part_of(parts, i_split, weight.rows, y_tangent), b_y_tangent, o_m, o_n)
        tl.debug_barrier()  # every thread has stored before one of them counts
        if tl.atomic_add(p_counters + i_tile, 1, sem="acq_rel") == SPLITS - 1:  # the last program of the tile
            if y is not None:
                store_sum(y, parts, 0, o_m, o_n, SPLITS)
            if y_tangent is not None:
                store_sum(y_tangent, parts, weight.rows, o_m, o_n, SPLITS)
            if i_n == 0:
                store_low_sum(u, parts, o_u, o_m, BLOCK_R, SPLITS)
                store_low_sum(c, parts, o_u + d_expand.columns, o_m, BLOCK_R, SPLITS)
            tl.atomic_xchg(p_counters + i_tile, 0, sem="relaxed")


def host(
    problem: LoraLinear, save: bool = True, primal: bool = True, config: Config | None = None, change: str = ""
) -> Result:
    """The result of one stream or two, in the dtype of x; one launch, no synchronization.

    `save`: with u and c. Not `primal`: without the y of two streams. `config` overrides what `configs.select` picks,
    `change` changes it (see `neighbours`). Raises ValueError for problems that the kernels do not serve.
    """
    key = repeated.key(problem, save, primal, change, config)
    kept = repeated.find(key)
    if kept is not None:
        return kept.run(problem)
    check_served(problem)
    if config is None:
        config = configuration(problem, flags.describable(problem.x, problem.weight), change)
    result = empty(problem.outputs(save, primal), problem.x)
    if problem.x.shape[0] > 0:
        build = flags.launch if config.design == "flags" else launch
        repeated.keep(key, build(problem, result, config), problem, result, build)
    return result


def launch(problem: LoraLinear, result: Result, config: Config) -> Launch:
    """The launch of the recompute design, which fills the result."""
    row_tiles = triton.cdiv(problem.x.shape[0], config.block_m)
    tiles = row_tiles * max(1, triton.cdiv(problem.weight.shape[0], config.block_n))
    return Launch(
        kernel=lora_linear_kernel,
        grid=(tiles * config.splits,),
        arguments={
            "x_tangent": matrix(problem.x_tangent),
            "y_tangent": matrix(result.y_tangent),
            **layer_arguments(problem, result, config),
            **split_arguments(problem, tiles, config),
        },
        config=config,
    )
