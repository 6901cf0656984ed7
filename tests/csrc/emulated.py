"""The operators of csrc/ on the CPU: their kernels' own source, run on the emulated machine of emulator/.

For the backend `cuda` what TRITON_INTERPRET=1 is for `triton`.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from emulator import build
from torch import Tensor

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


@contextmanager
def operators() -> Iterator[None]:
    """Inside, the operators of csrc/register.cpp take tensors of the CPU."""
    with torch.library._scoped_library("linlora_cuda", "FRAGMENT") as library:
        for schema in schemas():
            name = schema.partition("(")[0]
            if not hasattr(torch.ops.linlora_cuda, name):  # where linlora_cuda.so is loaded it has defined them
                library.define(schema)
            library.impl(name, functools.partial(_run, schema), "CPU")
        yield


def schemas() -> list[str]:
    """The operators as csrc/register.cpp declares them."""
    source = (build.CSRC / "register.cpp").read_text()
    declared = re.findall(r'library\.def\(\s*((?:"[^"]*"\s*)+)\)', source)
    return ["".join(re.findall(r'"([^"]*)"', strings)) for strings in declared]


def _run(schema: str, *arguments, **options) -> tuple[Tensor, ...]:
    """The outputs of one call of an operator, NaN before the launch."""
    names = [argument.name for argument in torch._C.parse_schema(schema).arguments]
    given = dict(zip(names, arguments, strict=False)) | options
    (m, n), rank = (given["x"].shape[0], given["weight"].shape[0]), given["shrink"].shape[0]
    two_streams = "x_tangent" in given
    saved = given.get("save", True)
    pair = given["expand" if two_streams else "d_shrink"] is not None
    widths = {
        "y": n if given.get("primal", True) else None,
        **({"y_tangent": n} if two_streams else {}),
        "u": rank if saved else 0,
        "c": rank if saved and pair else 0,
    }
    x = given["x"]
    outputs = {
        name: x.new_empty(0) if columns is None else x.new_full((m, columns), torch.nan)
        for name, columns in widths.items()
    }
    written = {name: None if widths[name] is None else output for name, output in outputs.items()}
    if m:
        tensors = {name: given.get(name) for name in LoraLinear.MATRICES} | written
        _launch(given.get("kernel", 0), two_streams, given["scaling"], tensors)
    return tuple(outputs.values())


def _launch(kernel: int, two_streams: bool, scaling: float, tensors: dict[str, Tensor | None]) -> None:
    x, bias = tensors["x"], tensors["bias"]
    factors = {
        name: tensors[name] for name in ("shrink", "d_shrink", "expand", "d_expand") if tensors[name] is not None
    }
    wide = any(tensor.dtype is torch.float32 for tensor in factors.values())
    factor_type = torch.float32 if wide else x.dtype
    tensors = tensors | {name: tensor.to(factor_type) for name, tensor in factors.items()}
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


@functools.cache
def _library(kernel: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.build(kernel)))
    for entry in (f"emulate_{kernel}", f"{kernel}_obstacle"):
        if hasattr(library, entry):
            getattr(library, entry).restype = ctypes.c_char_p
    return library
