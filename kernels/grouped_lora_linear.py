"""grouped_lora_linear: a LoRA layer with factors of its own for every group of rows; one stream, or both.

    one stream     y   = x Wᵀ + b + s [ c E0 + (u, without S0: c) dE_t ]        u = x' S0     c = u + x' dS_t
    both streams   y   = x Wᵀ + b + s u E0                                      u = x' S0     v = x' dS_t + x_t' S0
                   y_t = x_t Wᵀ   + s [ v E0 + u dE_t ]

    x, x_t (M, K)   W (N, K)   b (N,)   S0 (K, r)   dS (T, K, r)   E0 (r, N)   dE (T, r, N)   t the group of the row
    forward: S0, dS, E0, dE = A0ᵀ, A_t, B0ᵀ, B_t      backward: B0, B_tᵀ, A0, A_tᵀ, with W the transpose and no b

Each of the four may be absent, see `linlora.ops.aten.routed`. Two launches: `grouped_shrink` makes u and v; this
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

from .checks import check_grouped, check_linear_weight
from .configs import Config, select
from .device import device_traits
from .dropout import dropout_argument, keep_mask
from .grouped_shrink import partial_products
from .launch import Launch, block_r, dot_precision
from .stacks import Segments, group_at, load_from, rows_at, stack
from .tiles import bias_tile, dot, grouped_tile, load_tile, load_transposed, matrix, store_tile


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
        b_low_u = (b_u * scaling).to(DTYPE)
        b_low_c = (b_c * scaling).to(DTYPE)
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


def grouped_lora_linear(
    x: Tensor,
    placed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor | None,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor | None,
    layout: Segments,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    adjoint: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (M, N), u, c (M, r)) in the dtype of x, u or c (M, 0) where nothing makes it.

    Two launches, no synchronization. `config` overrides what `configs.select` picks for the second. Raises ValueError
    for shapes, dtypes and devices that do not fit.
    """
    check_linear_weight(x, weight, bias)
    rank = check_grouped(x, shrink, d_shrink, expand, d_expand, layout, dropout_p, seed, weight.shape[0])
    in_shrink = 0.0 if adjoint else dropout_p
    u_splits, v_splits = partial_products(x, None, shrink, d_shrink, layout, in_shrink, seed)
    y = x.new_empty(x.shape[0], weight.shape[0])
    u = x.new_empty(x.shape[0], 0 if u_splits is None else rank)
    c = x.new_empty(x.shape[0], 0 if v_splits is None else rank)
    if y.numel() > 0:
        config = config or _select("grouped_lora_linear", x, weight, rank)
        launch(
            x, None, weight, bias, expand, d_expand, layout, u_splits, v_splits, y, None, u, c, scaling,
            dropout_p, seed, adjoint, config,
        ).run(x.device)  # fmt: skip
    return y, u, c


def dual_grouped_lora_linear(
    x: Tensor,
    x_tangent: Tensor | None,
    placed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor,
    layout: Segments,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, y_tangent (M, N), u (M, r)) in the dtype of x: both streams, in two launches without synchronization."""
    check_linear_weight(x, weight, bias, x_tangent)
    rank = check_grouped(x, shrink, d_shrink, expand, d_expand, layout, dropout_p, seed, weight.shape[0])
    tangent_of_low = x_tangent if expand is not None else None  # at B0 = 0 nothing reads v
    u_splits, v_splits = partial_products(x, tangent_of_low, shrink, d_shrink, layout, dropout_p, seed)
    y, y_tangent = (x.new_empty(x.shape[0], weight.shape[0]) for _ in range(2))
    u = x.new_empty(x.shape[0], rank)
    if y.numel() > 0:
        config = config or _select("dual_grouped_lora_linear", x, weight, rank)
        launch(
            x, x_tangent, weight, bias, expand, d_expand, layout, u_splits, v_splits, y, y_tangent, u, None, scaling,
            dropout_p, seed, False, config,
        ).run(x.device)  # fmt: skip
    return y, y_tangent, u


def _select(op: str, x: Tensor, weight: Tensor, rank: int) -> Config:
    traits = device_traits(x.device)
    return select(
        op,
        m=x.shape[0],
        n=weight.shape[0],
        rank=rank,
        itemsize=x.element_size(),
        architecture=traits.architecture,
        multiprocessors=traits.multiprocessors,
    )


def launch(
    x: Tensor,
    x_tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor | None,
    layout: Segments,
    u_splits: Tensor | None,
    v_splits: Tensor | None,
    y: Tensor,
    y_tangent: Tensor | None,
    u: Tensor | None,
    c: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    adjoint: bool,
    config: Config,
) -> Launch:
    """The launch that fills y, y_tangent (unless None), and u and c (unless None or without columns)."""
    row_tiles, column_tiles = triton.cdiv(x.shape[0], config.block_m), triton.cdiv(weight.shape[0], config.block_n)
    splits = u_splits if u_splits is not None else v_splits
    return Launch(
        kernel=grouped_lora_linear_kernel,
        grid=(row_tiles * column_tiles,),
        arguments={
            "x": matrix(x),
            "x_tangent": matrix(x_tangent),
            "weight": matrix(weight),
            "p_bias": bias if bias is None else bias.contiguous(),
            "expand": matrix(expand),
            "d_expand": stack(d_expand),
            "segments": layout,
            "u_splits": stack(u_splits),
            "v_splits": stack(v_splits),
            "n_splits": splits.shape[0],
            "y": matrix(y),
            "y_tangent": matrix(y_tangent),
            "u": matrix(u) if u is not None and u.shape[1] else None,
            "c": matrix(c) if c is not None and c.shape[1] else None,
            "scaling": scaling,
            "dropout": dropout_argument(dropout_p, seed),
            "MASK_UPDATE": adjoint and dropout_p > 0.0,
            "PRECISION": dot_precision(x.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_r(splits.shape[2], config),
            "GROUP_M": config.group_m,
        },
        config=config,
    )
