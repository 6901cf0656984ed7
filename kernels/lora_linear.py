"""lora_linear: one LoRA layer on two streams, primal and tangent, in one launch.

    u = x' S0ᵀ      c = x' dSᵀ + x_t' S0ᵀ
    y   = x   Wᵀ + b + s u E0ᵀ
    y_t = x_t Wᵀ     + s [ c E0ᵀ + u dEᵀ ]
    short form (B0 = 0):   y = x Wᵀ + b      y_t = x_t Wᵀ + s u dEᵀ               no dS, no E0, no c

    x, x_t (M, K)   W (N, K)   b (N,)   shrink S0, d_shrink dS (r, K)   expand E0, d_expand dE (N, r)
    y, y_t (M, N)   u, c (M, r)         x', x_t' = mask/(1-p) ⊙ x, x_t: one mask for both streams

The backward is the same kernel on the transposes, with the streams swapped: x := g_t, x_t := g give (dx_t, dx) for
(S0, dS, E0, dE) = (B0ᵀ, dBᵀ, A0ᵀ, dAᵀ), weight Wᵀ, no bias. Then `adjoint` moves the dropout mask from the shrink's
input to the two updates. An input that had no tangent asks for no y in its backward: not `primal`. No x_t means that
it is zero: y_t is the update alone.

One program computes the same tile of y and of y_t, so every tile of W is loaded once for two products. u and c are
recomputed by every column tile (overhead 3r / 2·BLOCK_N) and stored by the first, a block of BLOCK_R ranks at a time.
Ranks up to BLOCK_R (64) read x and x_t once, in the loop over K that computes the frozen products. Every further
block of ranks is a loop over K of its own before that one, without W, which reads the same rows of x and x_t (from
L2, all but the first time) and its own rows of S0 and dS: ceil(r / BLOCK_R) times in all. The short form reads x_t
once at every rank.

                K →                      BLOCK_N         BLOCK_R      after each loop over K:
           ┌─────┬───                  ┌──────────┐       ┌───┐
   BLOCK_M │  x  │ …   ·  Wᵀ, S0ᵀ, dSᵀ │    y     │       │ u │         y   += s u E0ᵀ
           ├─────┼───      │           ├──────────┤       ├───┤
   BLOCK_M │ x_t │ …   ·  Wᵀ, S0ᵀ      │   y_t    │       │ c │         y_t += s c E0ᵀ + s u dEᵀ
           └─────┴───                  └──────────┘       └───┘

With few rows several programs share a tile, as in `linearized_lora_linear`.

Kept for backward: x, x_t, and u, c in x's dtype (M·r each).
Floor: 4MNK + 6Mr(K + N) FLOPs; 2MK + NK + 2MN + 2r(K + N) + 2Mr elements, each moved once.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

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


@triton.jit
def rank_block(
    b_y,
    b_y_tangent,
    o_m,
    o_n,
    r,
    is_first_column,
    x,
    x_tangent,
    weight,
    shrink,
    d_shrink,
    expand,
    d_expand,
    u,
    c,
    scaling,
    dropout,
    first_k,
    end_k,
    PRIMAL: tl.constexpr,
    MASK_UPDATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y and y_t + the updates of BLOCK_R ranks from r on, in one loop over K.

    The loop also adds the frozen products x Wᵀ and x_t Wᵀ. With no weight, y and y_t are sums of updates alone, and
    all of them is masked later. Without PRIMAL y stays as it is.
    """
    DTYPE: tl.constexpr = x.pointer.dtype.element_ty
    MASKED: tl.constexpr = MASK_UPDATE and weight is not None
    o_r = r + tl.arange(0, BLOCK_R)
    b_u = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    b_c = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(first_k, end_k, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = load_tile(x, o_m, o_k)
        if weight is not None:
            if PRIMAL or x_tangent is not None:
                b_weight = load_transposed(weight, o_n, o_k)
            if PRIMAL:
                b_y = dot(b_x, b_weight, b_y, PRECISION)
        if not MASK_UPDATE:
            b_x = drop(b_x, o_m, o_k, dropout)
        b_u = accumulate_shrink(b_u, b_x, shrink, o_r, o_k, PRECISION)
        if d_shrink is not None:
            b_c = accumulate_shrink(b_c, b_x, d_shrink, o_r, o_k, PRECISION)
        if x_tangent is not None and (weight is not None or expand is not None):
            b_x_tangent = load_tile(x_tangent, o_m, o_k)
            if weight is not None:
                b_y_tangent = dot(b_x_tangent, b_weight, b_y_tangent, PRECISION)
            if expand is not None:
                if not MASK_UPDATE:
                    b_x_tangent = drop(b_x_tangent, o_m, o_k, dropout)
                b_c = accumulate_shrink(b_c, b_x_tangent, shrink, o_r, o_k, PRECISION)

    if is_first_column:
        store_tile(u, b_u, o_m, o_r)
        if c is not None:
            store_tile(c, b_c, o_m, o_r)
    if PRIMAL and expand is not None:
        b_y = low_rank_update(b_y, b_u, expand, b_c, None, scaling, o_m, o_n, o_r, dropout, MASKED, DTYPE, PRECISION)
    b_y_tangent = low_rank_update(
        b_y_tangent, b_u, d_expand, b_c, expand, scaling, o_m, o_n, o_r, dropout, MASKED, DTYPE, PRECISION
    )
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
    u_or_part, c_or_part = u, c
    if SPLITS > 1:
        b_y = tl.where(i_split == 0, b_y, 0.0)
        u_or_part = part_of(parts, i_split, 2 * y_tangent.columns, u)
        if c is not None:
            c_or_part = part_of(parts, i_split, 2 * y_tangent.columns + u.columns, c)
    b_y_tangent = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # These come first and keep their invariants to themselves: addresses that are hoisted, or shared with the loop
    # over W, would hold registers through all of it, and spill.
    if not ONE_RANK_BLOCK:
        b_update = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r in tl.range(BLOCK_R, d_expand.columns, BLOCK_R, disable_licm=True):
            b_update, b_y_tangent = rank_block(
                b_update,
                b_y_tangent,
                o_m,
                o_n,
                r,
                i_n == 0,
                x,
                x_tangent,
                None,
                shrink,
                d_shrink,
                expand,
                d_expand,
                u_or_part,
                c_or_part,
                scaling,
                dropout,
                first_k,
                end_k,
                y is not None,
                MASK_UPDATE,
                PRECISION,
                BLOCK_M,
                BLOCK_K,
                BLOCK_R,
            )
        if MASK_UPDATE:
            b_y = add_masked(b_y, b_update, o_m, o_n, dropout)
            b_y_tangent = add_masked(tl.zeros_like(b_y_tangent), b_y_tangent, o_m, o_n, dropout)
        else:
            b_y += b_update
    b_y, b_y_tangent = rank_block(
        b_y,
        b_y_tangent,
        o_m,
        o_n,
        0,
        i_n == 0,
        x,
        x_tangent,
        weight,
        shrink,
        d_shrink,
        expand,
        d_expand,
        u_or_part,
        c_or_part,
        scaling,
        dropout,
        first_k,
        end_k,
        y is not None,
        MASK_UPDATE,
        PRECISION,
        BLOCK_M,
        BLOCK_K,
        BLOCK_R,
    )
    if SPLITS == 1:
        if y is not None:
            store_tile(y, b_y, o_m, o_n)
        store_tile(y_tangent, b_y_tangent, o_m, o_n)
    else:
        if y is not None:
            store_tile(part_of(parts, i_split, 0, y), b_y, o_m, o_n)
        store_tile(part_of(parts, i_split, y_tangent.columns, y_tangent), b_y_tangent, o_m, o_n)
        tl.debug_barrier()  # every thread has stored before one of them counts
        if tl.atomic_add(p_counters + i_tile, 1, sem="acq_rel") == SPLITS - 1:  # the last program of the tile
            if y is not None:
                store_sum(y, parts, 0, o_m, o_n, SPLITS)
            store_sum(y_tangent, parts, y_tangent.columns, o_m, o_n, SPLITS)
            if i_n == 0:
                store_low_sum(u, parts, 2 * y_tangent.columns, o_m, BLOCK_R, SPLITS)
                store_low_sum(c, parts, 2 * y_tangent.columns + u.columns, o_m, BLOCK_R, SPLITS)
            tl.atomic_xchg(p_counters + i_tile, 0, sem="relaxed")


def host(
    problem: LoraLinear, save: bool = True, primal: bool = True, config: Config | None = None, change: str = ""
) -> Result:
    """The result of two streams, in the dtype of x; one launch, no synchronization.

    `config` overrides what `configs.select` picks, `change` changes it (see `neighbours`). Raises ValueError for
    problems that the kernel does not serve.
    """
    key = repeated.key(problem, primal, change, config)
    kept = repeated.find(key)
    if kept is not None:
        result = kept.run(problem)
    else:
        check_served(problem)
        if config is None:
            config = configuration(problem, change=change)
        result = empty(problem.outputs(primal=primal), problem.x)
        if problem.x.shape[0] > 0:
            repeated.keep(key, launch(problem, result, config), problem, result, launch)
    return result if save else result._replace(u=None, c=None)  # the kernel stores u and c whoever wants them


def launch(problem: LoraLinear, result: Result, config: Config) -> Launch:
    """The launch that fills the result."""
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
