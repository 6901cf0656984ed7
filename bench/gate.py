"""The correctness gate: no time is printed for a job whose results differ from a float64 reference.

Results are compared by ‖out − ref‖ / ‖ref‖, output and every gradient by itself:

    y, y_tangent                what the layer returns
    grad_x, grad_x_tangent      gradients of its inputs
    grad_q, grad_gate, ...      the same of the inputs of an op of model scope: the gradients of its primal
    grad_A, grad_B              gradients of the trained factors (of dA and dB for a linearization), or inventories
    grad_Z                      the gradient of routing logits
    grad_A0, grad_B0, ...       gradients of the adapter of every task
    loss, grad_A, grad_B        of a whole model, the gradients over all of its layers (grad_A where B0 ≠ 0)

A result passes below the tolerance of its dtype, or at up to 1.2 times the error of linlora's composed torch path in
the same dtype. A gradient that is zero by the mathematics (of dA at B0 = 0) may be absent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from linlora.kernels.packing import pack, unpack
from linlora.kernels.problem import LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from linlora import baselines, reference

from . import routing, streams
from .cases import Case
from .data import Data, LayerData, RoutedData, StreamData
from .models import ModelJob

Errors = dict[str, float]

_LAYER_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
_MODEL_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-2}  # 16 bit: every layer adds its roundings
_SLACK = 1.2
_PREPARE: dict[str, Callable[[Any], nn.Module]] = {
    "linearized": partial(baselines.linearize_with_functorch, over="adapter"),
    "network": baselines.FunctorchModel,
}


def expected(case: Case, function: str, data: Data | None, device: torch.device) -> dict[str, Tensor]:
    """What a provider of `function` (see `linlora.bench.providers`) has to compute, in float64."""
    if isinstance(data, StreamData):
        return streams.reference(function, data)
    if isinstance(data, RoutedData):
        return routing.reference(function, data)
    if isinstance(data, LayerData):
        return _expected_layer(case, function, data)
    prepare = _PREPARE.get(function, lambda model: model)
    return ModelJob(case, device, prepare, train=function != "frozen", exact=True).results()


def errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> Errors:
    """The relative error of every expected result; inf for one that is missing or not finite."""
    return {name: _relative_error(results.get(name), reference) for name, reference in expected.items()}


def verdict(case: Case, found: Errors, composed: Errors | None = None) -> str | None:
    """None when every error is allowed, else the worst offender in words. `composed` are those of the torch path."""
    tolerance = (_MODEL_TOLERANCE if case.kind == "model" else _LAYER_TOLERANCE)[case.dtype]
    limits = {name: max(tolerance, _SLACK * (composed or {}).get(name, 0.0)) for name in found}
    wrong = {name: error for name, error in found.items() if not error <= limits[name]}
    if not wrong:
        return None
    name = max(wrong, key=lambda name: wrong[name] / limits[name])
    return f"{name}: rel err {wrong[name]:.1e} > {limits[name]:.0e}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element which a kernel forgets to write is an error."""
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def _relative_error(result: Tensor | None, reference: Tensor) -> float:
    norm = reference.norm().item()
    if result is None:
        return 0.0 if norm == 0.0 else math.inf
    if result.shape != reference.shape:
        return math.inf
    error = (result.double() - reference).norm().item() / (norm or 1.0)
    return error if math.isfinite(error) else math.inf


def _expected_layer(case: Case, function: str, data: LayerData) -> dict[str, Tensor]:
    tensors, numbers = pack(data.problem)
    exact = unpack(LoraLinear, [None if t is None else t.detach().double() for t in tensors], numbers)
    x, weight, bias, A0, B0, dA, dB, scaling, x_tangent, *_ = exact
    if function == "plain":
        A0, B0, dA, dB = data.A.detach().double(), None, None, data.B.detach().double()  # of which A0 trains
    leaves = {"grad_x": x, "grad_x_tangent": x_tangent}
    if function != "frozen" and case.phase != "input_gradient":
        leaves |= {"grad_A": A0 if function == "plain" else dA, "grad_B": dB}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf is not None}

    outputs: Any
    dropout: dict[str, Any] = {"dropout_p": data.problem.dropout_p, "seed": data.problem.seed}
    if function == "frozen":
        outputs = (linear(x, weight, bias), *(() if x_tangent is None else (linear(x_tangent, weight),)))
    elif x_tangent is not None:
        outputs = reference.lora_linear(x, weight, bias, A0, B0, dA, dB, scaling, x_tangent, **dropout)
    else:
        outputs = (reference.linearized_lora_linear(x, weight, bias, A0, B0, dA, dB, scaling, **dropout),)
    named = dict(zip(("y", "y_tangent"), outputs, strict=False))
    if case.phase != "forward":
        cotangents = [cotangent.double() for cotangent in data.cotangents]
        gradients = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), cotangents), strict=True))
        named = gradients if case.phase == "input_gradient" else named | gradients
    return {name: tensor.detach() for name, tensor in named.items()}
