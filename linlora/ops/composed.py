"""The ops as compositions of differentiable aten calls, in as few of them as the formulas allow.

They run in three situations. Under a `torch.func` transform or forward-mode AD every aten call is differentiated
exactly, where a fused Function would have to refuse. On the `torch` backend a Function written in Python costs about
70 us a call more than C++ autograd, which small problems do not earn back (`SMALL`). And where a dimension is 0 no
backend has anything to launch: the result is that of `F.linear`, with gradients of zeros.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.ops import aten
from linlora.ops.transforms import refuse_double_backward, transform_active
from linlora.reference import dropout

SMALL = 2**18
"""Elements of x and y together below which calls run composed on the torch backend: bench/NOTES.md, note 1."""


def preferred(backend: ModuleType, x: Tensor, weight: Tensor, rank: int, dropout_p: float) -> bool:
    """Whether a call on this backend should run composed: an empty one, or one on the torch backend that is small and
    has no mask that would be saved."""
    n, k = weight.shape
    if x.numel() == 0 or n == 0 or rank == 0:
        return True
    if backend is not aten or dropout_p > 0.0:
        return False
    return x.numel() * (n + k) < SMALL * k


def backward_backend(op: str, backend: ModuleType, *cotangents: Tensor | None) -> ModuleType:
    """What the backward of an op runs on: the backend of its forward, under a transform aten calls.

    Raises RuntimeError where the backward itself is being recorded, and for the batch of cotangents that
    `torch.autograd.grad(..., is_grads_batched=True)` makes, which is no transform of torch.func.
    """
    refuse_double_backward(op)
    compiling = torch.compiler.is_compiling()  # which does not trace the question, and has no such batch
    if not compiling and any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in cotangents):
        raise RuntimeError(
            f"{op}: the fused backward takes one cotangent, not a batch (is_grads_batched=True, vectorize=True). "
            "Take torch.func.vjp of the function and torch.func.vmap of that, or torch.func.jacrev."
        )
    return aten if transform_active() else backend


def linearized_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b + s [ (x' (A0 + dA)ᵀ) B0ᵀ + (x' A0ᵀ) dBᵀ ]."""
    weight, bias, A0, B0, dA, dB = _like(x, weight, bias, A0, B0, dA, dB)
    low = dropout(x, dropout_p, seed)
    y = _add_update(linear(x, weight, bias), linear(low, A0), dB, scaling)
    return y if B0 is None or dA is None else _add_update(y, linear(low, A0 + dA), B0, scaling)


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
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + b + s u B0ᵀ and y_t = x_t Wᵀ + s [ c B0ᵀ + u dBᵀ ], u = x' A0ᵀ, c = x' dAᵀ + x_t' A0ᵀ."""
    weight, bias, A0, B0, dA, dB = _like(x, weight, bias, A0, B0, dA, dB)
    low = dropout(x, dropout_p, seed)
    u = linear(low, A0)
    y = linear(x, weight, bias)
    y_tangent = scaling * linear(u, dB)
    if x_tangent is not None:
        y_tangent = y_tangent + linear(x_tangent, weight)
    if B0 is not None and dA is not None:
        y = _add_update(y, u, B0, scaling)
        c = linear(low, dA)
        if x_tangent is not None:
            c = c + linear(dropout(x_tangent, dropout_p, seed), A0)
        y_tangent = _add_update(y_tangent, c, B0, scaling)
    return y, y_tangent


def _add_update(y: Tensor, low: Tensor, expand: Tensor, scaling: float) -> Tensor:
    """y + s low expandᵀ, in one call for matrices."""
    if y.dim() == 2:
        return torch.addmm(y, low, expand.t(), alpha=scaling)
    return torch.add(y, linear(low, expand), alpha=scaling)


def _like(x: Tensor, *tensors: Tensor | None) -> list:
    return [t if t is None or t.dtype == x.dtype else t.to(x.dtype) for t in tensors]
