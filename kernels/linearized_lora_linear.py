"""linearized_lora_linear: one LoRA layer with its tangent folded in, y + y_t, in one launch.

    u = x' S0ᵀ      c = x' (S0 + dS)ᵀ      y = x Wᵀ + b + s [ c E0ᵀ + u dEᵀ ]
    short form (B0 = 0):                   y = x Wᵀ + b + s u dEᵀ                no dS, no E0, no c

    x (M, K)   W (N, K)   b (N,)   shrink S0, d_shrink dS (r, K)   expand E0, d_expand dE (N, r)
    y (M, N)   u, c (M, r)         x' = mask/(1-p) ⊙ x

Forward and backward are one kernel, for the operator is self-adjoint up to transposes:

    forward    (S0, dS, E0, dE) = (A0, dA, B0, dB)          weight W,  bias b
    dX         (S0, dS, E0, dE) = (B0ᵀ, dBᵀ, A0ᵀ, dAᵀ)      weight Wᵀ, no bias:  g W + s [ (g B0 + g dB) A0 + g B0 dA ]

The dropout mask lies over the shrink's input in the forward (x'; the frozen product sees x) and over the update in
the backward: adjoint, y = x Wᵀ + mask/(1-p) ⊙ s [ … ].

One program computes one tile of y, a block of BLOCK_R ranks at a time. A tile of x that is loaded feeds W and both
shrinks, so u and c cost each column tile 4·BLOCK_M·r·K FLOPs more (overhead 2r / BLOCK_N); the first column stores
them. Ranks up to BLOCK_R (64) read x once, in the loop over K that computes x Wᵀ. Every further block of ranks is a
loop over K of its own before that one, without W, which reads the same rows of x (from L2, all but the first time)
and its own rows of S0 and dS: x is read ceil(r / BLOCK_R) times in all. Beyond small M `linearized_lora_linear_flags`
computes u and c once instead, where the tensors' alignment allows.

                K →                        BLOCK_N      BLOCK_R
           ┌─────┬───                   ┌──────────┐    ┌───┐  ┌───┐     after each loop over K:
   BLOCK_M │  x  │ …   ·  Wᵀ, S0ᵀ, dSᵀ  │    y     │    │ u │  │ c │       y += s c E0ᵀ
           └─────┴───                   └──────────┘    └───┘  └───┘       y += s u dEᵀ

With few rows several programs share a tile (`configs.split`): each computes all of the above over a part of K, bias in
the first alone, and stores partial sums of y, u and c in fp32. The last one, by a counter of the tile that it sets back
to 0, adds them in the order of the parts: the same bits whoever is last.

Kept for backward: x, and u, c in x's dtype (M·r each).
Floor: 2MNK + 4Mr(K + N) FLOPs; MK + NK + MN + 2r(K + N) + 2Mr elements, each moved once.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

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
    part_of,
    store_low_sum,
    store_sum,
    store_tile,
)


@triton.jit
def rank_block(
    b_y,
    o_m,
    o_n,
    r,
    is_first_column,
    x,
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
    MASK_UPDATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y + the update of BLOCK_R ranks from r on, in one loop over K, which also adds x Wᵀ.

    With no weight, y is a sum of updates alone, and all of it is masked later.
    """
    DTYPE: tl.constexpr = x.pointer.dtype.element_ty
    MASKED: tl.constexpr = MASK_UPDATE and weight is not None
    o_r = r + tl.arange(0, BLOCK_R)
    b_u = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    b_v = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(first_k, end_k, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = load_tile(x, o_m, o_k)
        if weight is not None:
            b_y = dot(b_x, load_transposed(weight, o_n, o_k), b_y, PRECISION)
        if not MASK_UPDATE:
            b_x = drop(b_x, o_m, o_k, dropout)
        b_u = accumulate_shrink(b_u, b_x, shrink, o_r, o_k, PRECISION)
        if d_shrink is not None:
            b_v = accumulate_shrink(b_v, b_x, d_shrink, o_r, o_k, PRECISION)

    if is_first_column:
        if u is not None:
            store_tile(u, b_u, o_m, o_r)
        if c is not None:
            store_tile(c, b_u + b_v, o_m, o_r)
    return low_rank_update(
        b_y, b_u, d_expand, b_u + b_v, expand, scaling, o_m, o_n, o_r, dropout, MASKED, DTYPE, PRECISION
    )


@triton.jit
def linearized_lora_linear_kernel(
    x,
    weight,
    p_bias,
    shrink,
    d_shrink,
    expand,
    d_expand,
    y,
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
        if u is not None:
            u_or_part = part_of(parts, i_split, y.columns, u)
        if c is not None:
            c_or_part = part_of(parts, i_split, y.columns + d_expand.columns, c)
    # These come first and keep their invariants to themselves: addresses that are hoisted, or shared with the loop
    # over W, would hold registers through all of it, and spill.
    if not ONE_RANK_BLOCK:
        b_update = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r in tl.range(BLOCK_R, d_expand.columns, BLOCK_R, disable_licm=True):
            b_update = rank_block(
                b_update,
                o_m,
                o_n,
                r,
                i_n == 0,
                x,
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
                MASK_UPDATE,
                PRECISION,
                BLOCK_M,
                BLOCK_K,
                BLOCK_R,
            )
        b_y = add_masked(b_y, b_update, o_m, o_n, dropout) if MASK_UPDATE else b_y + b_update
    b_y = rank_block(
        b_y,
        o_m,
        o_n,
        0,
        i_n == 0,
        x,
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
        MASK_UPDATE,
        PRECISION,
        BLOCK_M,
        BLOCK_K,
        BLOCK_R,
    )
    if SPLITS == 1:
        store_tile(y, b_y, o_m, o_n)
    else:
        store_tile(part_of(parts, i_split, 0, y), b_y, o_m, o_n)
        tl.debug_barrier()  # every thread has stored before one of them counts
        if tl.atomic_add(p_counters + i_tile, 1, sem="acq_rel") == SPLITS - 1:  # the last program of the tile
            store_sum(y, parts, 0, o_m, o_n, SPLITS)
            if i_n == 0:
                store_low_sum(u, parts, y.columns, o_m, BLOCK_R, SPLITS)
                store_low_sum(c, parts, y.columns + d_expand.columns, o_m, BLOCK_R, SPLITS)
            tl.atomic_xchg(p_counters + i_tile, 0, sem="relaxed")


def host(
    problem: LoraLinear, save: bool = True, primal: bool = True, config: Config | None = None, change: str = ""
) -> Result:
    """The result of one stream, in the dtype of x; one launch, no synchronization. Its y is always computed.

    `config` overrides what `configs.select` picks, `change` changes it (see `neighbours`). Raises ValueError for
    problems that the kernel does not serve.
    """
    key = repeated.key(problem, save, change, config)
    kept = repeated.find(key)
    if kept is not None:
        return kept.run(problem)
    check_served(problem)
    if config is None:
        config = configuration(problem, flags.describable(problem.x, problem.weight), change)
    result = empty(problem.outputs(save), problem.x)
    if problem.x.shape[0] > 0:
        build = flags.launch if config.design == "flags" else launch
        repeated.keep(key, build(problem, result, config), problem, result, build)
    return result


def launch(problem: LoraLinear, result: Result, config: Config) -> Launch:
    """The launch of the recompute design, which fills the result."""
    row_tiles = triton.cdiv(problem.x.shape[0], config.block_m)
    tiles = row_tiles * max(1, triton.cdiv(problem.weight.shape[0], config.block_n))
    return Launch(
        kernel=linearized_lora_linear_kernel,
        grid=(tiles * config.splits,),
        arguments=layer_arguments(problem, result, config) | split_arguments(problem, tiles, config),
        config=config,
    )
