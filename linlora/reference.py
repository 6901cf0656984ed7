"""The mathematics of linlora, one function an op, as readable as the formulas.

Shapes, here and in every other layer of the code::

    x, x_tangent   (..., K)     activations and their tangent
    weight         (N, K)       frozen; bias (N,) or None
    A0, dA         (r, K)       down projection at the linearization point, and its tangent
    B0, dB         (N, r)       up projection at the linearization point, and its tangent
    scaling        float        alpha / r, or alpha / sqrt(r) for rsLoRA

Partial linearization (arXiv 2310.04742, eq. 4, applied to one LoRA layer)::

    y    = x Wᵀ + b + s (x A0ᵀ) B0ᵀ                                     primal
    y_t  = x_t Wᵀ + s [ (x_t A0ᵀ) B0ᵀ + (x A0ᵀ) dBᵀ + (x dAᵀ) B0ᵀ ]     tangent

`B0=None` says that the adapter starts at B0 = 0, as PEFT's do. Then `dA` has no effect and may be None.
With `A0` trainable, `B0=None` and `dB` the up projection, the layer is plain LoRA.

Everything here is composed of differentiable aten calls, so it runs in any dtype on any device and under every
`torch.func` transform. It is the oracle of the tests and the form the ops take under a transform.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    x_tangent: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The primal and the tangent of one LoRA layer: two tensors of shape (..., N)."""
    A0, dB = A0.to(x.dtype), dB.to(x.dtype)
    B0, dA = (None if factor is None else factor.to(x.dtype) for factor in (B0, dA))
    low = dropout(x, dropout_p, seed)
    y = linear(x, weight, bias)
    y_tangent = scaling * linear(linear(low, A0), dB)
    if B0 is not None:
        y = y + scaling * linear(linear(low, A0), B0)
        if dA is not None:
            y_tangent = y_tangent + scaling * linear(linear(low, dA), B0)
    if x_tangent is not None:
        y_tangent = y_tangent + linear(x_tangent, weight)
        if B0 is not None:
            low_tangent = dropout(x_tangent, dropout_p, seed)
            y_tangent = y_tangent + scaling * linear(linear(low_tangent, A0), B0)
    return y, y_tangent


def linearized_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Layer scope: primal + tangent of one LoRA layer whose input has no tangent, shape (..., N)."""
    y, y_tangent = lora_linear(x, weight, bias, A0, B0, dA, dB, scaling, dropout_p=dropout_p, seed=seed)
    return y + y_tangent


def delta_weight(A0: Tensor, B0: Tensor | None, dA: Tensor | None, dB: Tensor, scaling: float) -> Tensor:
    """Layer scope folded into the weight: ΔW = s [ (B0 + dB) A0 + B0 dA ], shape (N, K), rank at most 2r."""
    if B0 is None:
        return scaling * (dB @ A0)
    delta = (B0 + dB) @ A0
    return scaling * (delta if dA is None else delta + B0 @ dA)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Inverted dropout of x (..., K) by the mask that (seed, row, column) determine."""
    if p == 0.0:
        return x
    mask = keep_mask(x.numel() // max(x.shape[-1], 1), x.shape[-1], p, seed).view(x.shape)
    return x * (mask.to(x.dtype) / (1.0 - p))


def keep_mask(rows: int, columns: int, p: float, seed: Tensor | None, first_row: int = 0) -> Tensor:
    """The dropout mask of `rows` rows, from `first_row` on, as a pure function of `seed`, a 0-d int64 tensor.

    Element (i, j) is kept when 31 bits of ``mix(mix(i·φ + seed) + j·φ)`` reach p·2³¹, with φ the 32-bit golden ratio
    and `mix` the finalizer of MurmurHash3. Being a function of the position, the mask is recomputed in backward
    instead of saved, has the same bits in every backend, and serves primal and tangent alike.
    """
    if seed is None:
        raise ValueError("dropout needs a seed: pass seed=torch.randint(2**31, (), device=x.device)")
    row = torch.arange(first_row, first_row + rows, device=seed.device, dtype=torch.int32).unsqueeze(1)
    column = torch.arange(columns, device=seed.device, dtype=torch.int32)
    row_key = _mix(row * _GOLDEN + seed.to(torch.int32))
    return (_mix(row_key + column * _GOLDEN) & 0x7FFFFFFF) >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    """p as a 31-bit integer: an element whose hash lies below it is dropped."""
    return min(round(p * 2**31), 2**31 - 1)


_GOLDEN = 0x9E3779B1 - 2**32  # all arithmetic wraps in 32 bits


def _mix(h: Tensor) -> Tensor:
    h ^= (h >> 16) & 0xFFFF
    h *= 0x85EBCA6B - 2**32
    h ^= (h >> 13) & 0x7FFFF
    h *= 0xC2B2AE35 - 2**32
    h ^= (h >> 16) & 0xFFFF
    return h
