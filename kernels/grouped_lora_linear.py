"""grouped_lora_linear: a LoRA layer with factors of its own for every group of rows; one stream, or both.

    one stream     y   = x Wᵀ + b + s [ c E0 + (u, without S0: c) dE_t ]        u = x' S0     c = u + x' dS_t
    both streams   y   = x Wᵀ + b + s u E0                                      u = x' S0     v = x' dS_t + x_t' S0
                   y_t = x_t Wᵀ   + s [ v E0 + u dE_t ]

    x, x_t (M, K)   W (N, K)   b (N,)   S0 (K, r)   dS (T, K, r)   E0 (r, N)   dE (T, r, N)   t the group of the row
    forward: S0, dS, E0, dE = A0ᵀ, A_t, B0ᵀ, B_t      backward: B0, B_tᵀ, A0, A_tᵀ, with W the transpose and no b

Each of the four may be absent, see `grouped_problem`. Two launches: `grouped_shrink` makes u and v; this
kernel adds their update to the accumulator of the frozen product, which is written once. One program computes a tile
of y (and of y_t, from the same tile of W), for BLOCK_M rows in the order of their groups; rows are gathered as they are
loaded and stored. The update comes first, so that `adjoint` can move the dropout mask from the shrink's input to it
before the frozen product is added:

              r →                        K →                  BLOCK_N
           ┌───────┐               ┌─────┬───              ┌──────────┐
   BLOCK_M │ u, c  │ · E0, dE_t  + │  x  │ …   ·  Wᵀ   =   │    y     │
           └───────┘               └─────┴───              └──────────┘

Where groups meet in a tile it walks over them, one product of r ranks each, r/K of the tile's time.

Kept for backward: u and c in x's dtype (M·r each), stored by the first column of tiles.
Floor, beside the frozen layer's: 2Mr(K + N) FLOPs a factor pair; one more reading of x, and the factors.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_grouped
from .configs import Config
from .dropout import dropout_argument, keep_mask
from .grouped_problem import GroupedLoraLinear
from .grouped_shrink import partial_products
from .launch import Launch, block_r, chosen, dot_precision
from .packing import empty
from .problem import Result
from .stacks import Segments, group_at, load_from, rows_at, stack
from .tiles import bias_tile, dot, grouped_tile, load_tile, load_transposed, matrix, scaling_argument, store_tile


@triton.jit
def sum_of_splits(low, n_splits, o_m, o_r, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """low (splits, M, r) summed over its splits, in their order."""
    b_low = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if low is not None:
        for i_split in range(n_splits):
            b_low += load_from(low, i_split, o_m, o_r)
    return b_low


@triton.jit
def add_of_groups(b_y, b_low, d_expand, segments, place, end, o_place, o_r, o_n, PRECISION: tl.constexpr):
    """y + low dE_t, each row's t; low with s, in the dtype of the dots.

    The rows of other groups are zeros in a group's product. What is not finite in its factor is left out of it, since
    0 · ∞ is NaN, and makes the group's own rows NaN instead.
    """
    while place < end:
        i_group, past = group_at(segments, place, end)
        m_group = (o_place >= place) & (o_place < past)
        b_of_group = tl.where(m_group[:, None], b_low, 0.0).to(b_low.dtype)
        b_factor = load_from(d_expand, i_group, o_r, o_n).to(b_low.dtype)
        b_nothing = b_factor - b_factor  # 0, NaN where the factor is not finite
        b_factor = tl.where(b_nothing == 0.0, b_factor, 0.0).to(b_low.dtype)
        b_y = dot(b_of_group, b_factor, b_y, PRECISION)
        b_y += tl.where(m_group[:, None], tl.sum(b_nothing.to(tl.float32), 0)[None, :], 0.0)
        place = past
    return b_y


@triton.jit
def grouped_lora_linear_kernel(
    x,
    x_tangent,
    weight,
    p_bias,
    expand,
    d_expand,
    segments,
    u_splits,
    v_splits,
    n_splits,
    y,
    y_tangent,
    u,
    c,
    scaling,
    dropout,
    MASK_UPDATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    DTYPE: tl.constexpr = x.pointer.dtype.element_ty
    n_row_tiles = tl.cdiv(x.rows, BLOCK_M)
    i_m, i_n = grouped_tile(tl.program_id(0), n_row_tiles, tl.num_programs(0) // n_row_tiles, GROUP_M)
    place = i_m * BLOCK_M
    end = min(place + BLOCK_M, x.rows)
    o_place = place + tl.arange(0, BLOCK_M)
    o_m = rows_at(segments, o_place, x.rows)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)

    b_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_y_tangent = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in tl.range(0, (u if c is None else c).columns, BLOCK_R, disable_licm=True):
        o_r = r + tl.arange(0, BLOCK_R)
        b_u = sum_of_splits(u_splits, n_splits, o_m, o_r, BLOCK_M, BLOCK_R)
        b_c = sum_of_splits(v_splits, n_splits, o_m, o_r, BLOCK_M, BLOCK_R)
        if y_tangent is None:
            b_c += b_u
        if i_n == 0:
            if u is not None:
                store_tile(u, b_u, o_m, o_r)
            if c is not None:
                store_tile(c, b_c, o_m, o_r)
        b_low_u = (b_u * scaling.low).to(DTYPE)
        b_low_c = (b_c * scaling.low).to(DTYPE)
        if expand is not None:
            b_expand = load_tile(expand, o_r, o_n).to(DTYPE)
            if y_tangent is None:
                b_y = dot(b_low_c, b_expand, b_y, PRECISION)
            else:
                b_y = dot(b_low_u, b_expand, b_y, PRECISION)
                b_y_tangent = dot(b_low_c, b_expand, b_y_tangent, PRECISION)
        if d_expand is not None:
            if y_tangent is not None:
                b_y_tangent = add_of_groups(
                    b_y_tangent, b_low_u, d_expand, segments, place, end, o_place, o_r, o_n, PRECISION
                )
            elif u is None:
                b_y = add_of_groups(b_y, b_low_c, d_expand, segments, place, end, o_place, o_r, o_n, PRECISION)
            else:
                b_y = add_of_groups(b_y, b_low_u, d_expand, segments, place, end, o_place, o_r, o_n, PRECISION)
    b_y *= scaling.factor
    b_y_tangent *= scaling.factor
    if MASK_UPDATE:
        b_y = tl.where(keep_mask(o_m, o_n, dropout), b_y * dropout.inverse_keep, 0.0)
    b_y += bias_tile(p_bias, o_n, weight.rows, BLOCK_M, BLOCK_N)

    for k in range(0, x.columns, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_weight = load_transposed(weight, o_n, o_k)
        b_y = dot(load_tile(x, o_m, o_k), b_weight, b_y, PRECISION)
        if x_tangent is not None:
            b_y_tangent = dot(load_tile(x_tangent, o_m, o_k), b_weight, b_y_tangent, PRECISION)
    store_tile(y, b_y, o_m, o_n)
    if y_tangent is not None:
        store_tile(y_tangent, b_y_tangent, o_m, o_n)


def place(x: Tensor, layout: Segments, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """x itself: kernels gather rows and drop elements as they load them."""
    return x


def grouped_lora_linear(problem: GroupedLoraLinear, config: Config | None = None) -> Result:
    """The result of one stream or two, in the dtype of x.

    Two launches, no synchronization. `config` overrides what `configs.select` picks for the second. Raises ValueError
    for shapes, dtypes and devices that do not fit.
    """
    check_grouped(problem)
    splits = partial_products(problem)
    result = empty(problem.outputs(), problem.x)
    if result.y.numel() > 0:
        config = config or chosen(problem.op, problem.x, problem.weight.shape[0], problem.rank)
        launch(problem, result, splits, config).run(problem.x.device)
    return result


def launch(
    problem: GroupedLoraLinear, result: Result, splits: tuple[Tensor | None, Tensor | None], config: Config
) -> Launch:
    """The launch that fills the result, from u and v in splits."""
    x, weight, bias = problem.x, problem.weight, problem.bias
    row_tiles, column_tiles = triton.cdiv(x.shape[0], config.block_m), triton.cdiv(weight.shape[0], config.block_n)
    u_splits, v_splits = splits
    return Launch(
        kernel=grouped_lora_linear_kernel,
        grid=(row_tiles * column_tiles,),
        arguments={
            "x": matrix(x),
            "x_tangent": matrix(problem.x_tangent),
            "weight": matrix(weight),
            "p_bias": bias if bias is None else bias.contiguous(),
            "expand": None if problem.expand is None else matrix(problem.expand.t()),
            "d_expand": stack(problem.d_expand),
            "segments": problem.groups,
            "u_splits": stack(u_splits),
            "v_splits": stack(v_splits),
            "n_splits": next(split.shape[0] for split in splits if split is not None),
            "y": matrix(result.y),
            "y_tangent": matrix(result.y_tangent),
            "u": matrix(result.u),
            "c": matrix(result.c),
            "scaling": scaling_argument(problem.scaling),
            "dropout": dropout_argument(problem.dropout_p, problem.seed),
            "MASK_UPDATE": problem.masks_update and problem.dropout_p > 0.0,
            "PRECISION": dot_precision(x.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_r(problem.rank, config),
            "GROUP_M": config.group_m,
        },
        config=config,
    )
