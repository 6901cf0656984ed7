"""CUDA kernels on the emulated machine: problems, what the kernels make of them, and what is right."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from emulated import TYPES, LoraLinear, matrix
from emulator import build as emulator
from torch import Tensor

from linlora import reference
from linlora.testing import relative_error


@dataclass
class Problem:
    """The operands of one launch; the reference calls them A0, dA, B0, dB."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    shrink: Tensor
    d_shrink: Tensor | None
    expand: Tensor | None
    d_expand: Tensor
    x_tangent: Tensor | None = None
    two_streams: bool = False
    primal: bool = True
    saves: bool = True
    scaling: float = 0.75

    INPUTS = ("x", "weight", "bias", "shrink", "d_shrink", "expand", "d_expand", "x_tangent")

    def outputs(self) -> dict[str, Tensor]:
        """What a launch writes, NaN before it."""
        (m, _), n, rank = self.x.shape, self.weight.shape[0], self.shrink.shape[0]
        wanted = {"y": n} if self.primal else {}
        wanted |= {"y_tangent": n} if self.two_streams else {}
        wanted |= {"u": rank} if self.saves else {}
        wanted |= {"c": rank} if self.saves and self.expand is not None else {}
        return {name: self.x.new_full((m, columns), torch.nan) for name, columns in wanted.items()}

    def arguments(self, outputs: dict[str, Tensor]) -> LoraLinear:
        """What a launch is given."""
        tensors = {name: getattr(self, name) for name in self.INPUTS} | outputs
        return LoraLinear(
            TYPES[self.x.dtype], TYPES[self.shrink.dtype], TYPES[(self.x if self.bias is None else self.bias).dtype],
            **{name: matrix(tensors.get(name)) for name in LoraLinear.MATRICES},
            scaling=self.scaling, two_streams=self.two_streams,
        )  # fmt: skip

    def emulate(self, library: ctypes.CDLL, entry: str, multiprocessors: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """The outputs of the kernel. Fails with what the machine found wrong."""
        outputs = self.outputs()
        error = getattr(library, entry)(ctypes.byref(self.arguments(outputs)), multiprocessors, seed)
        assert error is None, error.decode()
        return outputs

    def cast(self, dtype: torch.dtype) -> "Problem":
        tensors = {name: getattr(self, name) for name in self.INPUTS}
        return Problem(
            **{name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()},
            two_streams=self.two_streams, primal=self.primal, saves=self.saves, scaling=self.scaling,
        )  # fmt: skip

    def composed(self) -> dict[str, Tensor]:
        """The outputs in aten calls of x's dtype: of float64, what is right."""
        x, x_tangent, shrink = self.x, self.x_tangent, self.shrink.to(self.x.dtype)
        factors = (self.shrink, self.expand, self.d_shrink, self.d_expand)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        outputs = {"u": x @ shrink.T}
        if self.two_streams:
            y, y_tangent = reference.lora_linear(x, self.weight, bias, *factors, self.scaling, x_tangent)
            outputs |= {"y": y, "y_tangent": y_tangent}
        else:
            outputs["y"] = reference.linearized_lora_linear(x, self.weight, bias, *factors, self.scaling)
        if self.d_shrink is not None:
            other = x_tangent if self.two_streams else x
            outputs["c"] = x @ self.d_shrink.to(x.dtype).T
            outputs["c"] += 0 if other is None else other @ shrink.T
        return outputs


class Record(ctypes.Structure):
    """What the last emulated launch was."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("blocks", "threads", "shared_bytes", "bank_conflicts"))


def random_problem(
    m: int = 20,
    n: int = 70,
    k: int = 40,
    rank: int = 5,
    *,
    form: str = "pair",
    streams: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    factor_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype | None = None,
    transposed: bool = False,
    bias: bool = True,
    tangent: bool = True,
    primal: bool = True,
    saves: bool = True,
) -> Problem:
    """Random operands; `transposed` lays the weight and the factors out as the backward passes them."""

    def matrix_of(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        values = (max(columns, 1) ** -0.5 * torch.randn(rows, columns)).to(dtype)
        return values.T.contiguous().T if transposed else values

    pair = form == "pair"
    return Problem(
        x=torch.randn(m, k).to(dtype),
        weight=matrix_of(n, k, dtype),
        bias=torch.randn(n).to(bias_dtype or factor_dtype) if bias else None,
        shrink=matrix_of(rank, k, factor_dtype),
        d_shrink=matrix_of(rank, k, factor_dtype) if pair else None,
        expand=matrix_of(n, rank, factor_dtype) if pair else None,
        d_expand=matrix_of(n, rank, factor_dtype),
        x_tangent=torch.randn(m, k).to(dtype) if streams == 2 and tangent else None,
        two_streams=streams == 2,
        primal=primal,
        saves=saves,
    )


def check_outputs(problem: Problem, outputs: dict[str, Tensor]) -> None:
    """Within 1e-2 of float64, and at most 1.2 times as far from it as aten calls in the same dtype.

    Few numbers are rounded better or worse by chance, and may cancel: those may be as far off as one rounding, or as
    the aten calls.
    """
    exact, composed = problem.cast(torch.float64).composed(), problem.composed()
    for name, output in outputs.items():
        error, bound = relative_error(output, exact[name]), 1.2 * relative_error(composed[name], exact[name])
        few = output.numel() < 1000
        bound = max(bound, torch.finfo(output.dtype).eps / 2) if few else min(bound, 1e-2)
        assert error <= bound, f"{name}: {error:.1e} off, allowed {bound:.1e}"


@pytest.fixture(scope="session")
def builder():
    """emulator/build.py, where there is a compiler for it."""
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler (g++ or clang++) to build the emulated kernels with")
    return emulator


@pytest.fixture(scope="session")
def build_emulated(builder):
    """A function that builds one kernel of csrc/ for the emulated machine."""

    def build(kernel: str) -> ctypes.CDLL:
        library = ctypes.CDLL(str(builder.build(kernel)))
        getattr(library, f"emulate_{kernel}").restype = ctypes.c_char_p
        library.emulated_launch.restype = ctypes.POINTER(Record)
        return library

    return build


@pytest.fixture(scope="session")
def make_problem():
    return random_problem


@pytest.fixture(scope="session")
def assert_right():
    return check_outputs
