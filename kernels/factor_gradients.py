"""factor_gradients: both skinny gradients of a LoRA layer, in one launch.

    d_expand = s gᵀ p  (N, Rp)          d_shrink = s qᵀ x'  (Rq, K)          x' = mask/(1-p) ⊙ x

    g (M, N)   p (M, Rp)   x (M, K)   q (M, Rq)       p and q are the saved u, v, c of forward and backward

Each gradient is wideᵀ low for a wide matrix (g or x) and a low one (p or q), summed over the M rows:

              columns of g        columns of x
            ┌────┬────┬───      ┌────┬────┬───       grid: column tiles of g, then of x (BLOCK_N columns)
    split 0 │    │    │         │    │    │            ×   blocks of BLOCK_R ranks
    split 1 │    │    │         │    │    │            ×   splits of the M rows
            └────┴────┴───      └────┴────┴───

g and x are read ceil(R / BLOCK_R) times: once for R <= 256, twice up to 512. p and q are read once a column tile.
With one split a program writes its tile. With more, each writes an fp32 partial to a workspace and counts itself; the
last to arrive adds the partials in the order of the splits, so the sum depends on shapes and the GPU model only:
deterministic, with no floating-point atomics and no second launch. It then sets its counter back to zero.

Kept for backward: nothing; this is the backward.
Floor: 2M(N·Rp + K·Rq) FLOPs; M(N + K + Rp + Rq) + N·Rp + K·Rq elements: bound by reading g and x.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import check_gradients
from .configs import Config, select
from .counters import counters
from .device import device_traits
from .dropout import drop, dropout_argument
from .launch import Launch, block_r, dot_precision
from .packing import empty
from .problem import FactorGradients, Gradients
from .tiles import dot, load_tile, matrix, store_tile

# A shorter split would cost more in partials than the program it adds is worth (an estimate, not yet measured).
MIN_ROWS_PER_SPLIT = 512


@triton.jit
def gradient_tile(
    wide,
    low,
    gradient,
    i_n,
    i_r,
    i_split,
    n_splits,
    rows_per_split,
    p_partials,
    p_counter,
    scaling,
    dropout,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """gradient (columns of wide, R) = s wide'ᵀ low over the rows of one split, or over all if this split is last."""
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first_row = i_split * rows_per_split
    b_gradient = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for row in range(first_row, min(first_row + rows_per_split, wide.rows), BLOCK_M):
        o_m = row + tl.arange(0, BLOCK_M)
        b_wide = drop(load_tile(wide, o_m, o_n), o_m, o_n, dropout)
        b_gradient = dot(tl.trans(b_wide), load_tile(low, o_m, o_r), b_gradient, PRECISION)

    if n_splits == 1:
        store_tile(gradient, b_gradient * scaling, o_n, o_r)
    else:
        o_partial = tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        tl.store(p_partials + i_split.to(tl.int64) * (BLOCK_N * BLOCK_R) + o_partial, b_gradient)
        tl.debug_barrier()  # every thread has stored before one of them releases
        if tl.atomic_add(p_counter, 1, sem="acq_rel") == n_splits - 1:
            b_gradient = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
            for _ in range(n_splits):
                b_gradient += tl.load(p_partials + o_partial, cache_modifier=".cg")
                p_partials += BLOCK_N * BLOCK_R
            store_tile(gradient, b_gradient * scaling, o_n, o_r)
            tl.atomic_xchg(p_counter, 0, sem="relaxed")


@triton.jit
def factor_gradients_kernel(
    g,
    p,
    d_expand,
    x,
    q,
    d_shrink_transposed,
    p_partials,
    p_counters,
    n_g_tiles,
    n_splits,
    rows_per_split,
    scaling,
    dropout,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_column, i_r, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_tile = i_column * tl.num_programs(1) + i_r
    p_tile_partials = p_partials + i_tile.to(tl.int64) * n_splits * (BLOCK_N * BLOCK_R)
    if i_column < n_g_tiles:
        if g is not None and i_r * BLOCK_R < p.columns:
            gradient_tile(
                g, p, d_expand, i_column, i_r, i_split, n_splits, rows_per_split, p_tile_partials,
                p_counters + i_tile, scaling, None, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
    elif x is not None and i_r * BLOCK_R < q.columns:
        gradient_tile(
            x, q, d_shrink_transposed, i_column - n_g_tiles, i_r, i_split, n_splits, rows_per_split, p_tile_partials,
            p_counters + i_tile, scaling, dropout, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip


def host(problem: FactorGradients, config: Config | None = None) -> Gradients:
    """Both gradients; one launch, deterministic, no synchronization.

    `config` overrides what `configs.select` picks. Raises ValueError for problems that the kernel does not serve.
    """
    check_gradients(problem)
    wide = problem.wide
    gradients = empty(problem.outputs(), wide)
    if all(gradient is None or gradient.numel() == 0 for gradient in gradients):
        return gradients
    if config is None:
        traits = device_traits(wide.device)
        config = select(
            "factor_gradients",
            m=wide.shape[0],
            n=0 if problem.g is None else problem.g.shape[1],
            rank=problem.rank,
            itemsize=wide.element_size(),
            architecture=traits.architecture,
            multiprocessors=traits.multiprocessors,
        )
    launch(problem, gradients, config).run(wide.device)
    return gradients


def launch(problem: FactorGradients, gradients: Gradients, config: Config) -> Launch:
    """The launch that fills the gradients."""
    p, g, q, x = problem[:4]
    wide, (d_expand, d_shrink) = problem.wide, gradients
    rows, device = wide.shape[0], wide.device
    g_tiles, x_tiles = (0 if a is None else triton.cdiv(a.shape[1], config.block_n) for a in (g, x))
    rank_block = block_r(problem.rank, config)
    rank_blocks = triton.cdiv(problem.rank, rank_block)
    tiles = (g_tiles + x_tiles) * rank_blocks
    programs = config.programs or 2 * device_traits(device).multiprocessors
    splits = max(1, min(programs // tiles, triton.cdiv(rows, MIN_ROWS_PER_SPLIT)))
    rows_per_split = triton.cdiv(triton.cdiv(rows, splits), config.block_m) * config.block_m
    partials = wide.new_empty(tiles * splits * config.block_n * rank_block if splits > 1 else 0, dtype=torch.float32)
    return Launch(
        kernel=factor_gradients_kernel,
        grid=(g_tiles + x_tiles, rank_blocks, splits),
        arguments={
            "g": matrix(g),
            "p": matrix(p),
            "d_expand": matrix(d_expand),
            "x": matrix(x),
            "q": matrix(q),
            "d_shrink_transposed": None if d_shrink is None else matrix(d_shrink.t()),
            "p_partials": partials,
            "p_counters": counters(device, tiles),
            "n_g_tiles": g_tiles,
            "n_splits": splits,
            "rows_per_split": rows_per_split,
            "scaling": float(problem.scaling),
            "dropout": dropout_argument(problem.dropout_p, problem.seed),
            "PRECISION": dot_precision(wide.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": rank_block,
        },
        config=config,
    )
