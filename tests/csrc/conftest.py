"""CUDA kernels on the emulated machine: problems, what the kernels make of them, and what is right."""

import ctypes
from dataclasses import dataclass

import emulated
import pytest
import torch
from compiled import OBJECTS, csrc
from emulator import build as emulator
from linlora.kernels.packing import pack, unpack
from linlora.kernels.problem import LoraLinear, Result
from torch import Tensor

from linlora import reference
from linlora.testing import relative_error


@dataclass
class Launch:
    """A problem, and what is asked of its kernel."""

    problem: LoraLinear
    save: bool = True
    primal: bool = True

    def outputs(self) -> dict[str, Tensor]:
        """What the kernel writes, NaN before it."""
        result = emulated.poisoned(self.problem, self.save, self.primal)
        return {name: output for name, output in result._asdict().items() if output is not None}

    def arguments(self, outputs: dict[str, Tensor]) -> emulated.Arguments:
        """What the kernel is given."""
        return emulated.arguments(self.problem, Result(**outputs))

    def emulate(self, library: ctypes.CDLL, entry: str, multiprocessors: int = 2, seed: int = 0) -> dict[str, Tensor]:
        """The outputs of the kernel. Fails with what the machine found wrong."""
        outputs = self.outputs()
        error = getattr(library, entry)(ctypes.byref(self.arguments(outputs)), multiprocessors, seed)
        assert error is None, error.decode()
        return outputs

    def with_changes(self, **fields: Tensor | None) -> "Launch":
        """The launch of the problem with other fields."""
        return Launch(self.problem._replace(**fields), self.save, self.primal)


def in_aten(problem: LoraLinear, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The outputs in aten calls of a dtype, x's own or another: of float64, what is right."""
    dtype = dtype or problem.x.dtype
    tensors, numbers = pack(problem)
    of: LoraLinear = unpack(LoraLinear, [None if t is None else t.to(dtype) for t in tensors], numbers)
    outputs = {"u": of.x @ of.shrink.T}
    if of.two_streams:
        outputs["y"], outputs["y_tangent"] = reference.lora_linear(*of[:9])
    else:
        outputs["y"] = reference.linearized_lora_linear(*of[:8])
    if of.d_shrink is not None:
        other = of.x_tangent if of.two_streams else of.x
        outputs["c"] = of.x @ of.d_shrink.T + (0 if other is None else other @ of.shrink.T)
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
) -> Launch:
    """Random operands; `transposed` lays the weight and the factors out as the backward passes them."""

    def matrix_of(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        values = (max(columns, 1) ** -0.5 * torch.randn(rows, columns)).to(dtype)
        return values.T.contiguous().T if transposed else values

    pair = form == "pair"
    problem = LoraLinear(
        x=torch.randn(m, k).to(dtype),
        weight=matrix_of(n, k, dtype),
        bias=torch.randn(n).to(bias_dtype or factor_dtype) if bias else None,
        shrink=matrix_of(rank, k, factor_dtype),
        expand=matrix_of(n, rank, factor_dtype) if pair else None,
        d_shrink=matrix_of(rank, k, factor_dtype) if pair else None,
        d_expand=matrix_of(n, rank, factor_dtype),
        scaling=0.75,
        x_tangent=torch.randn(m, k).to(dtype) if streams == 2 and tangent else None,
        two_streams=streams == 2,
    )
    return Launch(problem, saves, primal)


def check_outputs(launch: Launch, outputs: dict[str, Tensor]) -> None:
    """Within 1e-2 of float64, and at most 1.2 times as far from it as aten calls in the same dtype.

    Few numbers are rounded better or worse by chance, and may cancel: those may be as far off as one rounding, or as
    the aten calls.
    """
    problem = launch.problem
    exact, of_dtype = in_aten(problem, torch.float64), in_aten(problem)
    for name, output in outputs.items():
        error, bound = relative_error(output, exact[name]), 1.2 * relative_error(of_dtype[name], exact[name])
        few = output.numel() < 1000
        bound = max(bound, torch.finfo(output.dtype).eps / 2) if few else min(bound, 1e-2)
        assert error <= bound, f"{name}: {error:.1e} off, allowed {bound:.1e}"


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of a fresh library. Objects are kept in build/, so that only what changed is compiled; processes that
    build at the same time wait for each other."""
    try:
        csrc.toolchain()
    except csrc.CannotBuildError as error:
        pytest.skip(f"csrc/ is not compiled here: {error}")
    folder = tmp_path_factory.mktemp("csrc")
    csrc.build(folder, OBJECTS)
    return folder


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
def composed():
    return in_aten


@pytest.fixture(scope="session")
def assert_right():
    return check_outputs
