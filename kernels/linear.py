"""linear: one frozen linear layer on two streams, primal and tangent, in one launch.

    y = x Wᵀ + b      y_t = x_t Wᵀ

    x, x_t (M, K)   W (N, K)   b (N,)   y, y_t (M, N)

`lora_linear` without its low-rank part. One program computes the same tile of y and of y_t, so every tile of W is
loaded once for two products: at small M, where reading W is the time, the tangent is nearly free.

                K →                      BLOCK_N
           ┌─────┬───                  ┌──────────┐
   BLOCK_M │  x  │ …   ·  Wᵀ           │    y     │
           ├─────┼───     │            ├──────────┤
   BLOCK_M │ x_t │ …   ·  Wᵀ           │   y_t    │
           └─────┴───                  └──────────┘

Kept for backward: nothing. The tangent carries no gradient, so the backward is the ordinary dx = g W, one matmul.
Floor: 4MNK FLOPs; 2MK + NK + 2MN elements, each moved once.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_linear
from .configs import Config
from .launch import Launch, chosen, dot_precision
from .tiles import bias_tile, dot, grouped_tile, load_tile, load_transposed, matrix, store_tile


@triton.jit
def linear_kernel(
    x,
    x_tangent,
    weight,
    p_bias,
    y,
    y_tangent,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    n_row_tiles = tl.cdiv(x.rows, BLOCK_M)
    i_m, i_n = grouped_tile(tl.program_id(0), n_row_tiles, tl.num_programs(0) // n_row_tiles, GROUP_M)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)

    b_y = bias_tile(p_bias, o_n, weight.rows, BLOCK_M, BLOCK_N)
    b_y_tangent = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, x.columns, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_weight = load_transposed(weight, o_n, o_k)
        b_y = dot(load_tile(x, o_m, o_k), b_weight, b_y, PRECISION)
        b_y_tangent = dot(load_tile(x_tangent, o_m, o_k), b_weight, b_y_tangent, PRECISION)
    store_tile(y, b_y, o_m, o_n)
    store_tile(y_tangent, b_y_tangent, o_m, o_n)


def linear(
    x: Tensor, x_tangent: Tensor, weight: Tensor, bias: Tensor | None, config: Config | None = None, change: str = ""
) -> tuple[Tensor, Tensor]:
    """(y (M, N), y_tangent (M, N)) in the dtype of x; one launch, no synchronization.

    Without a tangent there is nothing to share: use `torch.nn.functional.linear`. `config` overrides what
    `configs.select` picks, `change` changes it (see `neighbours`). Raises ValueError for shapes, dtypes and devices
    that do not fit.
    """
    check_linear(x, x_tangent, weight, bias)
    m, n = x.shape[0], weight.shape[0]
    config = config or chosen("linear", x, n, rank=0, change=change)
    y, y_tangent = x.new_empty(m, n), x.new_empty(m, n)
    if y.numel() > 0:
        launch(x, x_tangent, weight, bias, y, y_tangent, config).run(x.device)
    return y, y_tangent


def launch(
    x: Tensor, x_tangent: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, y_tangent: Tensor, config: Config
) -> Launch:
    """The launch that fills y and y_tangent."""
    row_tiles, column_tiles = triton.cdiv(x.shape[0], config.block_m), triton.cdiv(weight.shape[0], config.block_n)
    return Launch(
        kernel=linear_kernel,
        grid=(row_tiles * column_tiles,),
        arguments={
            "x": matrix(x),
            "x_tangent": matrix(x_tangent),
            "weight": matrix(weight),
            "p_bias": bias if bias is None else bias.contiguous(),
            "y": matrix(y),
            "y_tangent": matrix(y_tangent),
            "PRECISION": dot_precision(x.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m,
        },
        config=config,
    )
