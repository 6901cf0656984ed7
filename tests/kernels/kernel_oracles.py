"""The ops' formulas in float64, and the one measure of error all kernel tests share."""

from __future__ import annotations

import torch
from linlora.kernels.configs import Config
from torch import Tensor

from linlora.reference import keep_mask

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# Tiles small enough that odd little matrices have several of them in every direction.
RECOMPUTE = Config("recompute", 16, 32, 32, 64, 4, 2, group_m=2)
FLAGS = Config("flags", 16, 32, 32, 64, 4, 2, group_m=2, programs=3)
SPLIT = Config("split", 16, 32, 0, 32, 4, 2, programs=1)
SPLIT_MANY = Config("split", 16, 32, 0, 32, 4, 2, programs=1000)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """‖actual − expected‖ / ‖expected‖ within the tolerance of actual's dtype, and the shapes equal."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error = ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    assert error <= tolerance, f"{name}: relative error {error:.2e} exceeds {tolerance:.0e}"


def wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.double() for tensor in tensors)


def mask_of(like: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | float:
    """mask / (1 - p) over a matrix, in float64."""
    if dropout_p == 0.0:
        return 1.0
    return keep_mask(*like.shape, dropout_p, seed).double() / (1.0 - dropout_p)


def linearized_lora_linear(
    x, weight, bias, shrink, d_shrink, expand, d_expand, scaling, dropout_p=0.0, seed=None, adjoint=False
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, c) of the self-adjoint form."""
    x, weight, bias, shrink, d_shrink, expand, d_expand = wide(x, weight, bias, shrink, d_shrink, expand, d_expand)
    low = x if adjoint else x * mask_of(x, dropout_p, seed)
    u = low @ shrink.t()
    update = u @ d_expand.t()
    c = u.new_empty(u.shape[0], 0)
    if expand is not None:
        c = low @ (shrink + d_shrink).t()
        update = update + c @ expand.t()
    y = x @ weight.t() + (0 if bias is None else bias)
    update = scaling * update
    return y + (update * mask_of(update, dropout_p, seed) if adjoint else update), u, c


def lora_linear(
    x, x_tangent, weight, bias, shrink, d_shrink, expand, d_expand, scaling, dropout_p=0.0, seed=None, adjoint=False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, y_tangent, u, c) of the dual form."""
    x, x_tangent, weight, bias, shrink, d_shrink, expand, d_expand = wide(
        x, x_tangent, weight, bias, shrink, d_shrink, expand, d_expand
    )
    x_tangent = torch.zeros_like(x) if x_tangent is None else x_tangent
    mask_in = 1.0 if adjoint else mask_of(x, dropout_p, seed)
    u = (x * mask_in) @ shrink.t()
    y, y_tangent = x @ weight.t() + (0 if bias is None else bias), x_tangent @ weight.t()
    mask_out = mask_of(y, dropout_p, seed) if adjoint else 1.0
    y_tangent = y_tangent + mask_out * scaling * (u @ d_expand.t())
    c = u.new_empty(u.shape[0], 0)
    if expand is not None:
        c = (x * mask_in) @ d_shrink.t() + (x_tangent * mask_in) @ shrink.t()
        y = y + mask_out * scaling * (u @ expand.t())
        y_tangent = y_tangent + mask_out * scaling * (c @ expand.t())
    return y, y_tangent, u, c


def layer(
    m: int,
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    factor_dtype: torch.dtype | None = None,
    short: bool = False,
) -> dict[str, Tensor | None]:
    """Random arguments of one layer, scaled so that the frozen product and the update are of one size."""

    def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(device, of)

    factor_dtype = factor_dtype or dtype
    pair = {"d_shrink": random(rank, k, of=factor_dtype), "expand": random(n, rank, of=factor_dtype)}
    return {
        "x": random(m, k),
        "weight": random(n, k),
        "bias": random(n),
        "shrink": random(rank, k, of=factor_dtype),
        **(dict.fromkeys(pair) if short else pair),
        "d_expand": random(n, rank, of=factor_dtype),
    }
