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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_dropout, check_gradient
from .configs import Config, select
from .device import device_traits
from .dropout import drop, dropout_argument
from .launch import Launch, block_r, dot_precision
from .stacks import Segments, rows_at, stack, store_to
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


def grouped_gradients(
    p: Tensor | None,
    g: Tensor | None,
    q: Tensor | None,
    x: Tensor | None,
    layout: Segments,
    n_groups: int,
    scaling: float,
    out_dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(d_expand (T, r, N), d_shrink (T, K, r)) in out_dtype; one launch, no synchronization, the same bits every time.

    Pass p and g, or q and x, as None to leave a gradient out; it is (0,) then. Dropout masks x. `config` overrides
    what `configs.select` picks. Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    check_gradient("p", p, "g", g)
    check_gradient("q", q, "x", x)
    wide, low = (g, p) if g is not None else (x, q)
    if wide is None or low is None:
        raise ValueError("grouped_gradients has nothing to do: pass p and g, or q and x, or all four")
    if q is not None and q.shape[1] != low.shape[1]:
        raise ValueError(f"p and q are of one rank, got {low.shape[1]} and {q.shape[1]}")
    check_dropout(dropout_p, seed, wide)
    d_expand = wide.new_empty((0,) if g is None else (n_groups, p.shape[1], g.shape[1]), dtype=out_dtype)
    d_shrink = wide.new_empty((0,) if x is None else (n_groups, x.shape[1], q.shape[1]), dtype=out_dtype)
    if d_expand.numel() == 0 and d_shrink.numel() == 0:
        return d_expand, d_shrink
    if config is None:
        traits = device_traits(wide.device)
        config = select(
            "grouped_gradients",
            m=wide.shape[0],
            n=wide.shape[1],
            rank=low.shape[1],
            itemsize=wide.element_size(),
            architecture=traits.architecture,
            multiprocessors=traits.multiprocessors,
        )
    launch(p, g, q, x, layout, n_groups, scaling, dropout_p, seed, d_expand, d_shrink, config).run(wide.device)
    return d_expand, d_shrink


def launch(
    p: Tensor | None,
    g: Tensor | None,
    q: Tensor | None,
    x: Tensor | None,
    layout: Segments,
    n_groups: int,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    d_expand: Tensor,
    d_shrink: Tensor,
    config: Config,
) -> Launch:
    """The launch that fills d_expand (from p, g) and d_shrink (from q, x); a pair that is None is left out."""
    wide = g if g is not None else x
    g_tiles, x_tiles = (0 if a is None else triton.cdiv(a.shape[1], config.block_n) for a in (g, x))
    rank = (p if p is not None else q).shape[1]
    rank_block = block_r(rank, config)
    return Launch(
        kernel=grouped_gradients_kernel,
        grid=(n_groups, triton.cdiv(rank, rank_block), g_tiles + x_tiles),
        arguments={
            "g": matrix(g),
            "p": matrix(p),
            "d_expand_transposed": None if g is None else stack(d_expand.mT),
            "x": matrix(x),
            "q": matrix(q),
            "d_shrink": None if x is None else stack(d_shrink),
            "segments": layout,
            "n_g_tiles": g_tiles,
            "scaling": scaling,
            "dropout": dropout_argument(dropout_p, seed),
            "PRECISION": dot_precision(wide.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": rank_block,
        },
        config=config,
    )
