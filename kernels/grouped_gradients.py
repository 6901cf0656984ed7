"""grouped_gradients: the gradients of every group's factors, sums over the group's rows, in one launch.

    d_expand_t = s pᵀ g  (r, N)          d_shrink_t = s x'ᵀ q  (K, r)          x' = mask/(1-p) ⊙ x

    g (M, N)   p (M, r)   x (M, K)   q (M, r)   d_expand (T, r, N)   d_shrink (T, K, r)

Each gradient is wideᵀ low for a wide matrix (g or x) and a low one (p or q), summed over the rows of a group:

              columns of g        columns of x
            ┌────┬────┬───      ┌────┬────┬───       grid: column tiles of g, then of x (BLOCK_N columns)
    group 0 │    │    │         │    │    │            ×   blocks of BLOCK_R ranks
    group 1 │    │    │         │    │    │            ×   groups
            └────┴────┴───      └────┴────┴───

A program reads its columns of the group's rows through the sort order, and writes its tile once: the sum is in the
order of the rows, so a run repeats to the bit. A group without rows gets zeros. g and x are read ceil(r / BLOCK_R)
times: once for r <= 256.

Kept for backward: nothing; this is the backward.
Floor: 2Mr(N + K) FLOPs; M(N + K + 2r) + T r (N + K) elements: bound by reading g and x.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .checks import check_gradients
from .configs import Config
from .dropout import drop, dropout_argument
from .grouped_problem import GroupedGradients
from .launch import Launch, block_r, chosen, dot_precision
from .packing import empty
from .problem import Gradients
from .stacks import rows_at, stack, store_to
from .tiles import dot, load_tile, matrix


@triton.jit
def gradient_of_group(
    wide,
    low,
    gradient,
    segments,
    i_group,
    i_n,
    o_r,
    scaling,
    dropout,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """gradient[i_group] (columns of wide, r) = s wide'ᵀ low over the rows of the group."""
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(segments.first + i_group)
    past = tl.load(segments.first + i_group + 1)
    b_gradient = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for place in range(first, past, BLOCK_M):
        o_place = place + tl.arange(0, BLOCK_M)
        o_m = tl.where(o_place < past, rows_at(segments, o_place, wide.rows), wide.rows)
        b_wide = drop(load_tile(wide, o_m, o_n), o_m, o_n, dropout)
        b_gradient = dot(tl.trans(b_wide), load_tile(low, o_m, o_r).to(b_wide.dtype), b_gradient, PRECISION)
    store_to(gradient, b_gradient * scaling, i_group, o_n, o_r)


@triton.jit
def grouped_gradients_kernel(
    g,
    p,
    d_expand_transposed,
    x,
    q,
    d_shrink,
    segments,
    n_g_tiles,
    scaling,
    dropout,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_group, i_column = tl.program_id(0), tl.program_id(2)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if i_column < n_g_tiles:
        if g is not None:
            gradient_of_group(
                g, p, d_expand_transposed, segments, i_group, i_column, o_r, scaling, None,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
    elif x is not None:
        gradient_of_group(
            x, q, d_shrink, segments, i_group, i_column - n_g_tiles, o_r, scaling, dropout,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip


def grouped_gradients(problem: GroupedGradients, config: Config | None = None) -> Gradients:
    """d_expand and d_shrink; one launch, no synchronization, the same bits every time. Dropout masks x.

    `config` overrides what `configs.select` picks. Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    check_gradients(problem)
    gradients = empty(problem.outputs(), problem.wide)
    if any(gradient is not None and gradient.numel() for gradient in gradients):
        wide = problem.wide
        config = config or chosen("grouped_gradients", wide, wide.shape[1], problem.rank)
        launch(problem, gradients, config).run(wide.device)
    return gradients


def launch(problem: GroupedGradients, gradients: Gradients, config: Config) -> Launch:
    """The launch that fills the gradients there are."""
    p, g, q, x = problem[:4]
    g_tiles, x_tiles = (0 if wide is None else triton.cdiv(wide.shape[1], config.block_n) for wide in (g, x))
    rank_block = block_r(problem.rank, config)
    return Launch(
        kernel=grouped_gradients_kernel,
        grid=(problem.n_groups, triton.cdiv(problem.rank, rank_block), g_tiles + x_tiles),
        arguments={
            "g": matrix(g),
            "p": matrix(p),
            "d_expand_transposed": None if g is None else stack(gradients.d_expand.mT),
            "x": matrix(x),
            "q": matrix(q),
            "d_shrink": stack(gradients.d_shrink),
            "segments": problem.groups,
            "n_g_tiles": g_tiles,
            "scaling": float(problem.scaling),
            "dropout": dropout_argument(problem.dropout_p, problem.seed),
            "PRECISION": dot_precision(problem.wide.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": rank_block,
        },
        config=config,
    )
