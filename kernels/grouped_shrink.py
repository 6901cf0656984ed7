"""grouped_shrink: the rank-r products of a routed layer, those with shared factors and those with every group's own.

    u = x' S0           v = x' dS_t [ + x_t' S0 ]          t the group of the row

    x, x_t (M, K)   S0 (K, r)   dS (T, K, r)   u, v (splits, M, r), fp32        x', x_t' = mask/(1-p) ⊙ x, x_t

One program takes BLOCK_M rows in the order of their groups, BLOCK_R ranks and one part of K. It walks over the groups
of its rows, nearly always one, with the rows of the others masked:

                 K, one split →
           ┌─────┬─────┬───                     ┌───┐ ┌───┐
   BLOCK_M │  x  │     │ …   · S0, dS_t         │ u │ │ v │
           └─────┴─────┴───                     └───┘ └───┘

Few rows leave most multiprocessors idle; K is split then, and whoever reads u and v adds the splits up in order.

Kept for backward: nothing; `grouped_lora_linear` keeps the u or c it makes of them.
Floor: 2MKr FLOPs a product; MK + (T + 1) K r elements, each moved once: bound by reading x.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_grouped
from .configs import Config
from .device import device_traits
from .dropout import drop, dropout_argument
from .grouped_problem import GroupedLoraLinear
from .launch import Launch, block_r, chosen, dot_precision
from .stacks import group_at, load_from, rows_at, stack, store_to
from .tiles import dot, load_tile, matrix


@triton.jit
def add_products(
    b_u,
    b_v,
    x,
    x_tangent,
    shrink,
    d_shrink,
    i_group,
    o_m,
    o_r,
    first_column,
    past_column,
    dropout,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(u, v) + the products of the rows o_m, all of one group, over one part of K."""
    for k in range(first_column, past_column, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = drop(load_tile(x, o_m, o_k), o_m, o_k, dropout)
        if shrink is not None:
            b_shrink = load_tile(shrink, o_k, o_r).to(b_x.dtype)
            b_u = dot(b_x, b_shrink, b_u, PRECISION)
            if x_tangent is not None:
                b_x_tangent = drop(load_tile(x_tangent, o_m, o_k), o_m, o_k, dropout)
                b_v = dot(b_x_tangent, b_shrink, b_v, PRECISION)
        if d_shrink is not None:
            b_v = dot(b_x, load_from(d_shrink, i_group, o_k, o_r).to(b_x.dtype), b_v, PRECISION)
    return b_u, b_v


@triton.jit
def grouped_shrink_kernel(
    x,
    x_tangent,
    shrink,
    d_shrink,
    segments,
    u,
    v,
    columns_per_split,
    dropout,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i_split = tl.program_id(2)
    place = tl.program_id(0) * BLOCK_M
    end = min(place + BLOCK_M, x.rows)
    o_place = place + tl.arange(0, BLOCK_M)
    o_row = rows_at(segments, o_place, x.rows)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_column = i_split * columns_per_split
    past_column = min(first_column + columns_per_split, x.columns)

    b_u = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    b_v = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if d_shrink is None:  # the groups share all there is: no walk, which Triton 3.6 cannot compile around u alone
        b_u, b_v = add_products(
            b_u, b_v, x, x_tangent, shrink, None, 0, o_row, o_r, first_column, past_column, dropout,
            PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        while place < end:
            i_group, past = group_at(segments, place, end)
            o_m = tl.where((o_place >= place) & (o_place < past), o_row, x.rows)
            b_u, b_of_group = add_products(
                b_u, tl.zeros_like(b_v), x, x_tangent, shrink, d_shrink, i_group, o_m, o_r, first_column, past_column,
                dropout, PRECISION, BLOCK_K,
            )  # fmt: skip
            # Selected, not added: to the zeros of other groups' rows a factor with an infinity gives NaN.
            b_v = tl.where((o_m < x.rows)[:, None], b_of_group, b_v)
            place = past
    if u is not None:
        store_to(u, b_u, i_split, o_row, o_r)
    if v is not None:
        store_to(v, b_v, i_split, o_row, o_r)


def partial_products(problem: GroupedLoraLinear, config: Config | None = None) -> tuple[Tensor | None, Tensor | None]:
    """u and v, (splits, M, r) in fp32, of a checked problem; None what has no factor."""
    x, rank = problem.x, problem.rank
    config = config or chosen("grouped_shrink", x, 0, rank)
    splits, _ = _splits(x, rank, config)
    has_v = problem.d_shrink is not None or _tangent(problem) is not None
    u = None if problem.shrink is None else x.new_empty(splits, x.shape[0], rank, dtype=torch.float32)
    v = x.new_empty(splits, x.shape[0], rank, dtype=torch.float32) if has_v else None
    if x.shape[0] > 0:
        launch(problem, u, v, config).run(x.device)
    return u, v


def grouped_shrink(problem: GroupedLoraLinear, config: Config | None = None) -> tuple[Tensor | None, Tensor | None]:
    """(u, c) with c = u + v, (M, r) in the dtype of x, None what has no factor; one launch and a sum of splits."""
    check_grouped(problem)
    u, v = (None if low is None else low.sum(0) for low in partial_products(problem, config))
    c = v if u is None or v is None else u + v
    dtype = problem.x.dtype
    return (None if u is None else u.to(dtype)), (None if c is None else c.to(dtype))


def _splits(x: Tensor, rank: int, config: Config) -> tuple[int, int]:
    """Into how many parts K is split, and the columns of each: two programs a multiprocessor, of four steps or more."""
    programs = triton.cdiv(x.shape[0], config.block_m) * triton.cdiv(rank, block_r(rank, config))
    wanted = (config.programs or 2 * device_traits(x.device).multiprocessors) // max(programs, 1)
    steps = triton.cdiv(x.shape[1], config.block_k)
    columns = triton.cdiv(steps, max(1, min(wanted, steps // 4))) * config.block_k
    return max(1, triton.cdiv(x.shape[1], max(columns, 1))), columns


def launch(problem: GroupedLoraLinear, u: Tensor | None, v: Tensor | None, config: Config) -> Launch:
    """The launch that fills u and v (each unless None)."""
    x, rank = problem.x, problem.rank
    rank_block = block_r(rank, config)
    splits, columns = _splits(x, rank, config)
    masked = 0.0 if problem.masks_update else problem.dropout_p
    return Launch(
        kernel=grouped_shrink_kernel,
        grid=(triton.cdiv(x.shape[0], config.block_m), triton.cdiv(rank, rank_block), splits),
        arguments={
            "x": matrix(x),
            "x_tangent": matrix(_tangent(problem)),
            "shrink": None if problem.shrink is None else matrix(problem.shrink.t()),
            "d_shrink": stack(problem.d_shrink),
            "segments": problem.groups,
            "u": stack(u),
            "v": stack(v),
            "columns_per_split": columns,
            "dropout": dropout_argument(masked, problem.seed),
            "PRECISION": dot_precision(x.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_k,
            "BLOCK_R": rank_block,
        },
        config=config,
    )


def _tangent(problem: GroupedLoraLinear) -> Tensor | None:
    """x_t where it has a part in v: at B0 = 0 nothing reads v."""
    return problem.x_tangent if problem.expand is not None else None
