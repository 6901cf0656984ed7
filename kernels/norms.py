"""norm: layer norm and RMS norm, the normalisation of rows on two streams, and its backward; one launch each.

    layer norm   x̂ = (x − mean(x)) rstd   rstd = (var(x) + eps)^-1/2     y = w ⊙ x̂ + b
    rms norm     x̂ = x rstd               rstd = (mean(x²) + eps)^-1/2   y = w ⊙ x̂

    y_t = w ⊙ J x_t        dx = J (w ⊙ g)
    J   = rstd (I − x̂ x̂ᵀ/N − 11ᵀ/N)      the last term in layer norm only: CENTERED

    x, x_t, y, y_t, g, dx (M, N)   w, b (N,) or None   mean, rstd (M,) in fp32

J, the Jacobian of x̂ in x, is symmetric, so the tangent and the backward apply the same matrix. One function here,
`apply_jacobian`, does it for both norms in both directions, from the row sums of z and z ⊙ x̂; J is never formed.

               BLOCK_N            BLOCK_N
            ┌──────────────────┬──────────────────┬───      pass 1  mean (layer norm)
    BLOCK_M │ x, x_t           │                  │ …       pass 2  rstd, and the two row sums of J x_t
            └──────────────────┴──────────────────┴───      pass 3  y, y_t

Rows that fit in one block, those of up to 8192 features in the table, stay in registers from pass to pass. Wider ones
are read again, from L1 or L2.

The variance is the mean square of the centered row, hence a pass of its own: mean(x²) − mean(x)² would cancel.
Everything is fp32 up to one rounding at the store, that of w ⊙ x̂ included.

Kept for backward: x, rstd and (layer norm) mean. The frozen w and b get no gradient.
Floor: forward 2MN elements and 2MN more with a tangent, backward 3MN: bound by memory, each moved once.
Measured: not yet run on a GPU; verified in the interpreter and by ahead-of-time compilation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_norm, check_norm_backward
from .configs import Config, select_by_size
from .device import device_traits
from .launch import Launch
from .norm_problem import Norm, NormResult
from .packing import empty
from .tiles import Matrix, load_tile, load_vector, matrix, store_tile, store_vector


@triton.jit
def load_centered(x, b_mean, o_m, o_n):
    """x − mean, zero outside x; x itself without a mean."""
    b_x = load_tile(x, o_m, o_n).to(tl.float32)
    if b_mean is not None:
        b_x = tl.where((o_n < x.columns)[None, :], b_x - b_mean[:, None], 0.0)
    return b_x


@triton.jit
def scale_columns(b_z, weight, o_m, o_n):
    """w ⊙ z; z itself without a weight."""
    return b_z if weight is None else b_z * load_tile(weight, o_m, o_n).to(tl.float32)


@triton.jit
def apply_jacobian(b_z, b_x_hat, b_rstd, b_mean_z, b_mean_z_x_hat, CENTERED: tl.constexpr):
    """J z on a block of columns, from the means of z and of z ⊙ x̂ over whole rows."""
    b_jz = b_z - b_x_hat * b_mean_z_x_hat[:, None]
    if CENTERED:
        b_jz -= b_mean_z[:, None]
    return b_jz * b_rstd[:, None]


@triton.jit
def norm_kernel(
    x,
    x_tangent,
    weight,
    bias,
    y,
    y_tangent,
    p_mean,
    p_rstd,
    eps,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A loop of one step, known at compile time, is inlined, and loads of the same tile without a store between them
    # are merged: that keeps the rows of one block in registers. Hence the stores at the end.
    END = 1 if ONE_BLOCK else x.columns
    CENTERED: tl.constexpr = p_mean is not None
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_mean = None
    if CENTERED:
        b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for n in range(0, END, BLOCK_N):
            b_sum += tl.sum(load_tile(x, o_m, n + tl.arange(0, BLOCK_N)).to(tl.float32), 1)
        b_mean = b_sum / x.columns

    b_sum_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_sum_z = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_sum_z_x = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for n in range(0, END, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_x = load_centered(x, b_mean, o_m, o_n)
        b_sum_square += tl.sum(b_x * b_x, 1)
        if x_tangent is not None:
            b_z = load_tile(x_tangent, o_m, o_n).to(tl.float32)
            b_sum_z += tl.sum(b_z, 1)
            b_sum_z_x += tl.sum(b_z * b_x, 1)
    b_rstd = tl.rsqrt(b_sum_square / x.columns + eps)
    b_mean_z, b_mean_z_x_hat = b_sum_z / x.columns, b_sum_z_x / x.columns * b_rstd

    for n in range(0, END, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_x_hat = load_centered(x, b_mean, o_m, o_n) * b_rstd[:, None]
        if x_tangent is not None:
            b_z = load_tile(x_tangent, o_m, o_n).to(tl.float32)
            b_jz = apply_jacobian(b_z, b_x_hat, b_rstd, b_mean_z, b_mean_z_x_hat, CENTERED)
            store_tile(y_tangent, scale_columns(b_jz, weight, o_m, o_n), o_m, o_n)
        b_y = scale_columns(b_x_hat, weight, o_m, o_n)
        if bias is not None:
            b_y += load_tile(bias, o_m, o_n).to(tl.float32)
        store_tile(y, b_y, o_m, o_n)
    store_vector(p_rstd, b_rstd, o_m, x.rows)
    if CENTERED:
        store_vector(p_mean, b_mean, o_m, x.rows)


@triton.jit
def norm_backward_kernel(
    g,
    x,
    weight,
    p_mean,
    p_rstd,
    dx,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    END = 1 if ONE_BLOCK else x.columns  # see norm_kernel
    CENTERED: tl.constexpr = p_mean is not None
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_rstd = load_vector(p_rstd, o_m, x.rows)
    b_mean = None
    if CENTERED:
        b_mean = load_vector(p_mean, o_m, x.rows)

    b_sum_z = tl.zeros((BLOCK_M,), dtype=tl.float32)
    b_sum_z_x = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for n in range(0, END, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_z = scale_columns(load_tile(g, o_m, o_n).to(tl.float32), weight, o_m, o_n)
        b_sum_z += tl.sum(b_z, 1)
        b_sum_z_x += tl.sum(b_z * load_centered(x, b_mean, o_m, o_n), 1)
    b_mean_z, b_mean_z_x_hat = b_sum_z / x.columns, b_sum_z_x / x.columns * b_rstd

    for n in range(0, END, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_z = scale_columns(load_tile(g, o_m, o_n).to(tl.float32), weight, o_m, o_n)
        b_x_hat = load_centered(x, b_mean, o_m, o_n) * b_rstd[:, None]
        store_tile(dx, apply_jacobian(b_z, b_x_hat, b_rstd, b_mean_z, b_mean_z_x_hat, CENTERED), o_m, o_n)


def norm(problem: Norm, config: Config | None = None) -> NormResult:
    """Both streams in the dtype of x, mean and rstd in fp32.

    `config` overrides what `configs.select_by_size` picks. Raises ValueError for shapes, dtypes and devices that do not
    fit.
    """
    check_norm(problem)
    result = empty(problem.outputs(), problem.x)
    if problem.x.shape[0] > 0:
        launch(problem, result, config or _config(problem.x)).run(problem.x.device)
    return result


def norm_backward(problem: Norm, g: Tensor, result: NormResult, config: Config | None = None) -> Tensor:
    """dx (M, N) in the dtype of x, from the mean and rstd that `norm` returned. Raises like it."""
    check_norm_backward(problem, g, result)
    dx = problem.x.new_empty(problem.x.shape)
    if dx.shape[0] > 0:
        launch_backward(problem, g, result, dx, config or _config(dx)).run(dx.device)
    return dx


def _config(x: Tensor) -> Config:
    architecture = device_traits(x.device).architecture
    return select_by_size("norm", size=x.shape[1], itemsize=x.element_size(), architecture=architecture)


def _blocks(x: Tensor, config: Config) -> dict[str, int]:
    block_n = min(config.block_n, triton.next_power_of_2(x.shape[1]))
    return {"ONE_BLOCK": x.shape[1] <= block_n, "BLOCK_M": config.block_m, "BLOCK_N": block_n}


def _every_row(vector: Tensor | None, x: Tensor) -> Matrix | None:
    """A vector (N,) as a matrix like x, with a row stride of zero: its tiles are loaded in the register layout of
    those of x, where a 1-D load would be shuffled into it through shared memory."""
    return None if vector is None else matrix(vector.expand(x.shape))


def launch(problem: Norm, result: NormResult, config: Config) -> Launch:
    """The launch that fills the result; no mean asks for the RMS norm."""
    x = problem.x
    return Launch(
        kernel=norm_kernel,
        grid=(triton.cdiv(x.shape[0], config.block_m),),
        arguments={
            "x": matrix(x),
            "x_tangent": matrix(problem.x_tangent),
            "weight": _every_row(problem.weight, x),
            "bias": _every_row(problem.bias, x),
            "y": matrix(result.y),
            "y_tangent": matrix(result.y_tangent),
            "p_mean": result.mean,
            "p_rstd": result.rstd,
            "eps": float(problem.eps),
            **_blocks(x, config),
        },
        config=config,
    )


def launch_backward(problem: Norm, g: Tensor, result: NormResult, dx: Tensor, config: Config) -> Launch:
    """The launch that fills dx."""
    x, mean = problem.x, result.mean
    return Launch(
        kernel=norm_backward_kernel,
        grid=(triton.cdiv(x.shape[0], config.block_m),),
        arguments={
            "g": matrix(g),
            "x": matrix(x),
            "weight": _every_row(problem.weight, x),
            "p_mean": None if mean is None else mean.contiguous(),
            "p_rstd": result.rstd.contiguous(),
            "dx": matrix(dx),
            **_blocks(x, config),
        },
        config=config,
    )
