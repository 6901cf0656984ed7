"""One parity harness for both ops: every output and every gradient of a backend against the float64 reference."""

import operator

import pytest
import torch
from linlora.kernels.problem import LoraLinear
from torch import Tensor

import linlora
from linlora import functional, reference
from linlora.ops import composed
from linlora.testing import relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


class Case(LoraLinear):
    """A problem whose tensors are leaves, and the names that they have in the public ops."""

    __slots__ = ()
    NAMES = ("x", "weight", "bias", "A0", "B0", "dA", "dB", "x_tangent")
    A0, B0, dA, dB = (property(operator.attrgetter(role)) for role in ("shrink", "expand", "d_shrink", "d_expand"))

    def leaves(self) -> dict[str, Tensor]:
        return {name: tensor for name in self.NAMES if (tensor := getattr(self, name)) is not None}

    def cast(self, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> "Case":
        def of(field: str, value):
            if field == "seed" or not isinstance(value, Tensor):
                return value
            is_factor = field.endswith(("shrink", "expand"))
            return value.detach().to(factor_dtype or dtype if is_factor else dtype)

        return Case(*map(of, self._fields, self))

    def require_grad(self, names: tuple[str, ...]) -> "Case":
        for name, tensor in self.leaves().items():
            tensor.requires_grad_(name in names)
        return self

    def call(self, op: str, module) -> tuple[Tensor, ...]:
        arguments = self[: 9 if op == "lora_linear" else 8]
        y = getattr(module, op)(*arguments, dropout_p=self.dropout_p, seed=self.seed)
        return y if isinstance(y, tuple) else (y,)


def make_problem(
    shape=(2, 5), n=7, k=11, rank=3, form="pair", bias=True, tangent=False, dropout_p=0.0, device="cpu"
) -> Case:
    """Random float64 arguments, weights scaled so that every term of the formulas is of order one."""

    def normal(*size, scale=1.0):
        return torch.randn(*size, dtype=torch.float64, device=device) * scale

    return Case(
        x=normal(*shape, k),
        weight=normal(n, k, scale=k**-0.5),
        bias=normal(n) if bias else None,
        shrink=normal(rank, k, scale=k**-0.5),
        expand=normal(n, rank, scale=rank**-0.5) if form == "pair" else None,
        d_shrink=normal(rank, k, scale=k**-0.5) if form == "pair" else None,
        d_expand=normal(n, rank, scale=rank**-0.5),
        scaling=0.75,
        x_tangent=normal(*shape, k) if tangent else None,
        dropout_p=dropout_p,
        seed=torch.tensor(20231, device=device) if dropout_p else None,
    )


@pytest.fixture(autouse=True)
def _function_at_any_size(monkeypatch):
    """The sizes of these tests would all run composed; the backend "composed" of `check` asks for that."""
    monkeypatch.setattr(composed, "SMALL", 0)


@pytest.fixture
def tolerance():
    """The relative error that is allowed in a dtype."""
    return TOLERANCE


@pytest.fixture
def running(monkeypatch, request):
    """`with running(backend)`: a backend, by name; the CUDA kernels are emulated where there is no GPU."""

    def running(backend):
        monkeypatch.setattr(composed, "SMALL", 2**62 if backend == "composed" else 0)
        if backend == "cuda":
            request.getfixturevalue("cuda_kernels")
        return linlora.use_backend("torch" if backend == "composed" else backend)

    return running


@pytest.fixture
def check(running):
    """check(op, backend, problem, dtype, ...) compares outputs and gradients with the float64 reference."""

    def check(op, backend, problem, dtype, factor_dtype=None, wrt=Case.NAMES, cotangents=None, tolerance=None):
        tolerance = tolerance or TOLERANCE[dtype]
        rounded = problem.cast(dtype, factor_dtype)
        exact = rounded.cast(torch.float64).require_grad(wrt)
        rounded.require_grad(wrt)
        with running(backend):
            outputs = rounded.call(op, functional)
        expected = exact.call(op, reference)
        used = [i for i in cotangents or range(len(expected)) if expected[i].requires_grad]
        g = [torch.randn_like(y).to(dtype) for y in expected]
        leaves, exact_leaves = list(rounded.leaves()), exact.leaves()
        gradients = torch.autograd.grad(
            [outputs[i] for i in used],
            [t for t in rounded.leaves().values() if t.requires_grad],
            [g[i] for i in used],
            allow_unused=True,
        )
        exact_gradients = torch.autograd.grad(
            [expected[i] for i in used],
            [t for t in exact_leaves.values() if t.requires_grad],
            [g[i].double() for i in used],
            allow_unused=True,
        )
        for i, (y, y_exact) in enumerate(zip(outputs, expected, strict=True)):
            assert y.dtype == dtype
            assert relative_error(y, y_exact) < tolerance, f"output {i}"
        names = [name for name in leaves if exact_leaves[name].requires_grad]
        for name, gradient, exact_gradient in zip(names, gradients, exact_gradients, strict=True):
            if exact_gradient is None:
                assert gradient is None or not gradient.any(), f"gradient of {name} should be zero"
                continue
            assert gradient is not None, f"gradient of {name} is missing"
            assert gradient.dtype == rounded.leaves()[name].dtype
            assert relative_error(gradient, exact_gradient) < tolerance, f"gradient of {name}"

    return check


@pytest.fixture
def problem(device):
    return lambda **options: make_problem(**options, device=device)
