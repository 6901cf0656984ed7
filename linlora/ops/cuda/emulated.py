"""The CUDA kernels without a GPU: their sources, compiled for the CPU, run on the emulated machine of csrc/emulator.

For tests, in a checkout, with LINLORA_CUDA_EMULATE=1: what TRITON_INTERPRET=1 is to the Triton kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch
from torch import Tensor

from linlora.ops.cuda import checkout

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_MULTIPROCESSORS = 2


class Matrix(ctypes.Structure):
    """`Matrix` of csrc/lora_linear.h."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64),
        ("row_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64),
    )  # fmt: skip


class LoraLinear(ctypes.Structure):
    """`LoraLinear` of csrc/lora_linear.h."""

    MATRICES = (
        "x", "x_tangent", "weight", "bias", "shrink", "d_shrink", "expand", "d_expand", "y", "y_tangent", "u", "c",
    )  # fmt: skip
    _fields_ = (
        ("type", ctypes.c_int32), ("factor_type", ctypes.c_int32), ("bias_type", ctypes.c_int32),
        *((name, Matrix) for name in MATRICES), ("scaling", ctypes.c_float), ("two_streams", ctypes.c_bool),
    )  # fmt: skip


def matrix(tensor: Tensor | None) -> Matrix:
    """A matrix, or a vector as one row; absent for None. The tensor has to stay alive."""
    if tensor is None:
        return Matrix()
    tensor = tensor if tensor.ndim == 2 else tensor.unsqueeze(0)
    return Matrix(tensor.data_ptr(), *tensor.shape, *tensor.stride())


def enabled() -> bool:
    """Whether the environment asks for emulation."""
    return os.environ.get("LINLORA_CUDA_EMULATE") == "1"


@functools.cache
def obstacle() -> str | None:
    """Why nothing can be emulated, with the remedy; None once the libraries are there."""
    try:
        _library("lora_linear_sm80")
        _library("lora_linear_sm90")
    except RuntimeError as error:
        return f"the kernels cannot be emulated: {error}"
    return None


def linearized_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    adjoint: bool,
    save: bool,
    kernel: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, c) of the operator."""
    m, rank = x.shape[0], shrink.shape[0]
    y, u = _poisoned(x, m, weight.shape[0]), _poisoned(x, m, rank if save else 0)
    c = _poisoned(x, m, rank if save and d_shrink is not None else 0)
    _run(
        kernel, False, scaling, x=x, weight=weight, bias=bias, shrink=shrink, d_shrink=d_shrink, expand=expand,
        d_expand=d_expand, y=y, u=u, c=c,
    )  # fmt: skip
    return y, u, c


def lora_linear(
    x: Tensor,
    x_tangent: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    shrink: Tensor,
    d_shrink: Tensor | None,
    expand: Tensor | None,
    d_expand: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    adjoint: bool,
    primal: bool,
    kernel: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, y_tangent, u, c) of the operator."""
    (m, n), rank = (x.shape[0], weight.shape[0]), shrink.shape[0]
    y = _poisoned(x, m, n) if primal else x.new_empty(0)
    y_tangent, u, c = _poisoned(x, m, n), _poisoned(x, m, rank), _poisoned(x, m, 0 if expand is None else rank)
    _run(
        kernel, True, scaling, x=x, x_tangent=x_tangent, weight=weight, bias=bias, shrink=shrink, d_shrink=d_shrink,
        expand=expand, d_expand=d_expand, y=y if primal else None, y_tangent=y_tangent, u=u, c=c,
    )  # fmt: skip
    return y, y_tangent, u, c


def _run(kernel: int, two_streams: bool, scaling: float, **tensors: Tensor | None) -> None:
    x = tensors["x"]
    assert x is not None
    if x.shape[0] == 0:
        return
    names = ("shrink", "d_shrink", "expand", "d_expand")
    factors = {name: tensor for name in names if (tensor := tensors[name]) is not None}
    wide = any(tensor.dtype is torch.float32 for tensor in factors.values())
    factor_type = torch.float32 if wide else x.dtype
    tensors |= {name: tensor.to(factor_type) for name, tensor in factors.items()}
    bias = tensors["bias"]
    problem = LoraLinear(
        TYPES[x.dtype], TYPES[factor_type], TYPES[x.dtype if bias is None else bias.dtype],
        **{name: matrix(tensor) for name, tensor in tensors.items()}, scaling=scaling, two_streams=two_streams,
    )  # fmt: skip
    reference = ctypes.byref(problem)
    obstacle = None if kernel == 80 else _library("lora_linear_sm90").lora_linear_sm90_obstacle(reference)
    if kernel == 90 and obstacle is not None:
        raise RuntimeError(f"kernel 90 cannot compute this: {obstacle.decode()}")
    name = "lora_linear_sm80" if kernel == 80 or obstacle is not None else "lora_linear_sm90"
    error = getattr(_library(name), f"emulate_{name}")(reference, _MULTIPROCESSORS, 0)
    if error is not None:
        raise RuntimeError(f"{name}, emulated: {error.decode()}")


def _poisoned(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_full((rows, columns), torch.nan)


@functools.cache
def _library(kernel: str) -> ctypes.CDLL:
    builder = checkout.script("emulator/build.py")
    if builder is None:
        raise RuntimeError(f"linlora does not run from a checkout, there is no {checkout.CSRC}/emulator")
    library = ctypes.CDLL(str(builder.build(kernel)))
    for entry in (f"emulate_{kernel}", f"{kernel}_obstacle"):
        if hasattr(library, entry):
            getattr(library, entry).restype = ctypes.c_char_p
    return library
