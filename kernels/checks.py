"""The constraints on arguments, stated once. Every violation is a ValueError that names what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from .device import unavailable

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 256
MAX_GRADIENT_RANK = 2 * MAX_RANK


def check_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    x_tangent: Tensor | None = None,
) -> int:
    """The rank r of the layer, once x (M, K), weight (N, K), bias (N,), shrink (r, K) and expand (N, r) agree."""
    check_activation("x", x)
    if weight.ndim != 2 or shrink.ndim != 2:
        raise ValueError(f"weight and shrink are 2-D, got {tuple(weight.shape)} and {tuple(shrink.shape)}")
    m, k = x.shape
    n, rank = weight.shape[0], shrink.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank {rank} is outside 1..{MAX_RANK}")
    _check_like("weight", weight, (n, k), x, factor=False)
    _check_like("shrink", shrink, (rank, k), x, factor=True)
    _check_like("d_expand", d_expand, (n, rank), x, factor=True)
    if bias is not None:
        _check_like("bias", bias, (n,), x, factor=True)
    if d_shrink is not None:
        _check_like("d_shrink", d_shrink, (rank, k), x, factor=True)
    if expand is not None:
        _check_like("expand", expand, (n, rank), x, factor=True)
    if x_tangent is not None:
        _check_like("x_tangent", x_tangent, (m, k), x, factor=False)
    if (d_shrink is None) != (expand is None):
        raise ValueError("d_shrink and expand come together, or neither does (the short form, B0 = 0)")
    check_dropout(dropout_p, seed, x)
    return rank


def check_gradient(name: str, low: Tensor | None, other_name: str, wide: Tensor | None) -> None:
    """One product of `factor_gradients`: low (M, R) and wide (M, columns), or neither."""
    if (low is None) != (wide is None):
        raise ValueError(f"{name} and {other_name} come together: pass both or neither")
    if low is None or wide is None:
        return
    check_activation(other_name, wide)
    if low.ndim != 2 or not 1 <= low.shape[1] <= MAX_GRADIENT_RANK:
        raise ValueError(f"{name} is (M, R) with R in 1..{MAX_GRADIENT_RANK}, got {tuple(low.shape)}")
    _check_like(name, low, (wide.shape[0], low.shape[1]), wide, factor=False)


def check_activation(name: str, x: Tensor) -> None:
    """x is a matrix of a dtype the kernels know, on a device they run on."""
    if x.ndim != 2:
        raise ValueError(f"{name} is 2-D (rows, features), got {tuple(x.shape)}; flatten the leading dimensions")
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{name} is fp32, fp16 or bf16, got {x.dtype}")
    reason = unavailable(x.device)
    if reason is not None:
        raise ValueError(f"the Triton kernels cannot run: {reason}")


def check_dropout(dropout_p: float, seed: Tensor | None, x: Tensor) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is in [0, 1), got {dropout_p}")
    if dropout_p == 0.0:
        return
    if seed is None:
        raise ValueError("dropout needs a seed: pass seed=torch.randint(2**31, (), device=x.device)")
    if seed.ndim != 0 or seed.dtype != torch.int64 or seed.device != x.device:
        raise ValueError(
            f"seed is a 0-d int64 tensor on {x.device}, got {seed.dtype} {tuple(seed.shape)} {seed.device}"
        )


def _check_like(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, *, factor: bool) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} is {shape} here, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, the activations are on {x.device}")
    if tensor.dtype != x.dtype and not (factor and tensor.dtype is torch.float32):
        accepted = f"{x.dtype} or torch.float32" if factor and x.dtype is not torch.float32 else f"{x.dtype}"
        raise ValueError(f"{name} is {accepted} beside {x.dtype} activations, got {tensor.dtype}")
