"""What the ops ask of their arguments, stated once."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype autocast computes linear layers in, where autocast is on; the ops cast the rest to x's dtype."""
    device = x.device.type
    if autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; False for those it does not exist on ("meta")."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_number(op: str, name: str, value: float | Tensor) -> None:
    """Raise a ValueError for a number that asks for a gradient, which no op gives."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        _refuse(op, f"{name} asks for a gradient, which this op does not give; pass a number, and scale an input by it")


def check_dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    if not 0.0 <= dropout_p < 1.0:
        _refuse(op, f"dropout_p is {dropout_p}: a probability below 1 is expected")
    if dropout_p > 0.0 and seed is None:
        _refuse(op, "dropout needs a seed: pass seed=torch.randint(2**31, (), device=x.device)")


def check_lora_linear(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    x_tangent: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Raise a ValueError that names the argument, what it is and what it has to be."""
    if x.dim() == 0 or weight.dim() != 2 or A0.dim() != 2:
        _refuse(op, f"x (..., K), weight (N, K) and A0 (r, K) are expected, got {_shapes(x=x, weight=weight, A0=A0)}")
    n, k = weight.shape
    r = A0.shape[0]
    if x.shape[-1] != k:
        _refuse(op, f"x has {x.shape[-1]} features in its last dimension, {_shapes(weight=weight)} takes {k}")
    if A0.shape[1] != k or dB.shape != (n, r):
        _refuse(op, f"factors A0 ({r}, {k}) and dB ({n}, {r}) are expected, got {_shapes(A0=A0, dB=dB)}")
    if B0 is not None:
        if dA is None:
            _refuse(op, "dA is missing: with a B0 the tangent needs both dA (r, K) and dB (N, r); zeros will do")
        elif B0.shape != dB.shape or dA.shape != A0.shape:
            _refuse(op, f"dA like A0 and B0 like dB are expected, got {_shapes(A0=A0, dA=dA, B0=B0, dB=dB)}")
    if bias is not None and bias.shape != (n,):
        _refuse(op, f"bias ({n},) is expected, got {_shapes(bias=bias)}")
    if x_tangent is not None and (x_tangent.shape != x.shape or x_tangent.dtype != x.dtype):
        _refuse(op, f"x_tangent is expected like x, got {_shapes(x=x, x_tangent=x_tangent)}")
    if x.dtype not in DTYPES:
        _refuse(op, f"x is {x.dtype}: use float32, float16, bfloat16 (or float64 on the torch backend)")
    if weight.dtype != x.dtype and not autocast_enabled(x.device.type):
        _refuse(op, f"x is {x.dtype} and weight is {weight.dtype}: cast x, or run under torch.autocast")
    for name, factor in (("A0", A0), ("B0", B0), ("dA", dA), ("dB", dB)):
        if factor is not None:
            if factor.dtype not in (x.dtype, torch.float32) and not autocast_enabled(x.device.type):
                _refuse(op, f"{name} is {factor.dtype}: factors are float32 or of x's dtype ({x.dtype})")
            if factor.device != x.device:
                _refuse(op, f"{name} is on {factor.device}, x on {x.device}: move the model or the input")
    for name, tensor in (("weight", weight), ("bias", bias), ("x_tangent", x_tangent)):
        if tensor is not None and tensor.device != x.device:
            _refuse(op, f"{name} is on {tensor.device}, x on {x.device}: move the model or the input")
    check_dropout(op, dropout_p, seed)


def _refuse(op: str, message: str) -> None:
    raise ValueError(f"{op}: {message}")


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
