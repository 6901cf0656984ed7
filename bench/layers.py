"""One layer, built the way each provider builds it, from the same tensors."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import chain
from typing import Any

import torch
from linlora.kernels.packing import present
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

import linlora
from linlora import functional
from linlora.baselines import FunctorchLoraLinear, Over

from .data import LayerData
from .job import Layer


def frozen(data: LayerData) -> Layer:
    """The floor: the frozen `nn.Linear` alone, once for every stream."""
    module = frozen_linear(data.problem.weight, data.problem.bias)
    if not data.problem.two_streams:
        return Layer(module, {}, _tensors(module))
    return Layer(lambda x, x_tangent: (module(x), linear(x_tangent, module.weight)), {}, _tensors(module))


def addmm(data: LayerData) -> Layer:
    """Plain LoRA with the update added by `addmm` into the output of the base layer; no module, no PEFT."""
    module, A, B = frozen_linear(data.problem.weight, data.problem.bias), nn.Parameter(data.A), nn.Parameter(data.B)

    def forward(x: Tensor) -> Tensor:
        return torch.addmm(linear(x, module.weight, module.bias), x @ A.t(), B.t(), alpha=data.problem.scaling)

    return Layer(forward, {"A": A, "B": B}, [*_tensors(module), A, B])


def peft(data: LayerData) -> Layer:
    """Plain LoRA as PEFT runs it."""
    layer = _lora_layer(_peft_model(data, data.A, data.B))
    return Layer(layer, _adapter(layer), _tensors(layer))


def linearized(data: LayerData) -> Layer:
    """linlora: the PEFT layer after `linlora.linearize`; for two streams or a given dropout mask, the op itself."""
    problem = data.problem
    if problem.two_streams or problem.seed is not None:
        return _op(data)
    model = _peft_model(data, problem.shrink, _point_of_B(data))
    linlora.linearize(model)
    layer = _lora_layer(model)
    if not problem.is_pair:
        trainable = {"B": layer.lora_B["default"].weight}
        trainable["B"].data = problem.d_expand
    else:
        trainable = {"A": layer.lora_dA["default"], "B": layer.lora_dB["default"]}
        trainable["A"].data, trainable["B"].data = problem.d_shrink, problem.d_expand
    return Layer(layer, trainable, _tensors(layer))


def functorch(data: LayerData, over: Over) -> Layer:
    """`torch.func.jvp` around the PEFT layer, over all its parameters or over A and B."""
    module = FunctorchLoraLinear(_lora_layer(_peft_model(data, data.problem.shrink, _point_of_B(data))), over)
    trainable = _adapter(module.layer)
    trainable["A"].data, trainable["B"].data = data.A, data.B
    forward = module if not data.problem.two_streams else _functorch_dual(module)
    return Layer(forward, trainable, _tensors(module))


def _op(data: LayerData) -> Layer:
    """The public op of one stream or two, whose dA and dB train."""
    problem, module = data.problem, frozen_linear(data.problem.weight, data.problem.bias)
    if problem.two_streams and not problem.is_pair:
        raise ValueError("the op with two streams is measured at B0 ≠ 0: make it a case of form 'pair'")
    trainable = {"B": nn.Parameter(problem.d_expand)}
    if problem.d_shrink is not None:
        trainable = {"A": nn.Parameter(problem.d_shrink), **trainable}
    A0, B0, dA, dB = problem.shrink, problem.expand, trainable.get("A"), trainable["B"]
    op = getattr(functional, problem.op)

    def forward(x: Tensor, *x_tangent: Tensor, seed: Tensor | None = problem.seed) -> Any:
        factors, dropout = (A0, B0, dA, dB, problem.scaling), {"dropout_p": problem.dropout_p, "seed": seed}
        return op(x, module.weight, module.bias, *factors, *x_tangent, **dropout)

    draws = None if problem.seed is None else partial(forward, seed=None)
    return Layer(forward, trainable, [*_tensors(module), *present((A0, B0)), *trainable.values()], draws)


def _functorch_dual(module: FunctorchLoraLinear) -> Any:
    """The two-stream form of `FunctorchLoraLinear.forward`: the input is one more primal, with its own tangent."""

    def forward(x: Tensor, x_tangent: Tensor) -> Any:
        (point,), (delta,) = module.point_and_delta()
        return torch.func.jvp(
            lambda parameters, x: torch.func.functional_call(module.layer, parameters, (x,)),
            (point, x),
            (delta, x_tangent),
        )

    return forward


def _peft_model(data: LayerData, A: Tensor, B: Tensor) -> PeftModel:
    """A PEFT model of one LoRA layer that shares the tensors of `data`; the factors keep the dtype of the layer."""
    config = LoraConfig(
        r=A.shape[0], lora_alpha=round(data.problem.scaling * A.shape[0]), target_modules=["linear"], lora_dropout=0.0
    )
    base = nn.Sequential(OrderedDict(linear=frozen_linear(data.problem.weight, data.problem.bias)))
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    adapter = _adapter(_lora_layer(model))
    adapter["A"].data, adapter["B"].data = A, B
    return model


def frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` of these tensors, none of them copied."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _point_of_B(data: LayerData) -> Tensor:
    """B0, where it is 0 as well."""
    return torch.zeros_like(data.B) if data.problem.expand is None else data.problem.expand


def _lora_layer(model: Any) -> Any:
    return model.base_model.model.linear


def _adapter(layer: Any) -> dict[str, Tensor]:
    return {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(chain(module.parameters(), module.buffers()))
