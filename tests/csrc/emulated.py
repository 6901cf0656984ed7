"""The operator of csrc/ on the CPU: its kernels' own source, run on the emulated machine of emulator/.

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
from linlora.kernels import packing
from linlora.kernels.problem import LoraLinear, Result
from torch import Tensor

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_MULTIPROCESSORS = 2


class Matrix(ctypes.Structure):
    """`Matrix` of csrc/lora_linear.h."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64),
        ("row_stride", ctypes.c_int64), ("column_stride", ctypes.c_int64),
    )  # fmt: skip


class Arguments(ctypes.Structure):
    """`LoraLinear` of csrc/lora_linear.h: a problem and its result."""

    MATRICES = (
        "x", "x_tangent", "weight", "bias", "shrink", "expand", "d_shrink", "d_expand", *Result._fields,
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
    """Inside, the operator of csrc/register.cpp takes tensors of the CPU."""
    with torch.library._scoped_library("linlora_cuda", "FRAGMENT") as library:
        for schema in schemas():
            name = schema.partition("(")[0]
            if not hasattr(torch.ops.linlora_cuda, name):  # where linlora_cuda.so is loaded it has defined them
                library.define(schema)
            library.impl(name, _run, "CPU")
        yield


def schemas() -> list[str]:
    """The operators that csrc/register.cpp declares."""
    source = (build.CSRC / "register.cpp").read_text()
    declared = re.findall(r'library\.def\(\s*((?:"[^"]*"\s*)+)\)', source)
    return ["".join(re.findall(r'"([^"]*)"', strings)) for strings in declared]


def arguments(problem: LoraLinear, result: Result) -> Arguments:
    """What a launch is given. The tensors have to stay alive; the factors are of one dtype."""
    tensors, bias = problem._asdict() | result._asdict(), problem.x if problem.bias is None else problem.bias
    return Arguments(
        TYPES[problem.x.dtype], TYPES[problem.shrink.dtype], TYPES[bias.dtype],
        **{name: matrix(tensors[name]) for name in Arguments.MATRICES},
        scaling=problem.scaling, two_streams=problem.two_streams,
    )  # fmt: skip


def poisoned(problem: LoraLinear, save: bool = True, primal: bool = True) -> Result:
    """What a launch writes, NaN before it."""
    empty = packing.empty(problem.outputs(save, primal), problem.x)
    return Result(*(None if output is None else output.fill_(torch.nan) for output in empty))


def _run(tensors: list[Tensor | None], *rest, counters=None, kernel: int = 0) -> list[Tensor]:
    """The outputs of one call of the operator."""
    problem, options = packing.unpacked(LoraLinear, {"save": True, "primal": True}, tensors, rest)
    result = poisoned(problem, **options)
    if problem.x.shape[0]:
        _launch(problem, result, kernel)
    return packing.present(result)


def _launch(problem: LoraLinear, result: Result, kernel: int) -> None:
    names = ("shrink", "expand", "d_shrink", "d_expand")
    factors = {name: factor for name in names if (factor := getattr(problem, name)) is not None}
    wide = any(factor.dtype is torch.float32 for factor in factors.values())
    dtype = torch.float32 if wide else problem.x.dtype
    problem = problem._replace(**{name: factor.to(dtype) for name, factor in factors.items()})
    reference = ctypes.byref(arguments(problem, result))
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
