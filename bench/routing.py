"""One layer on a mixed batch of tasks, built the way each provider builds it, from the same tensors.

    frozen       the frozen `nn.Linear` alone, the floor
    one adapter  plain LoRA of PEFT, the first task's adapter for all rows: what routing should cost
    routed       linlora's `routed_lora_linear`: weights, mixing, grouping and the layer, all of it in every step
    poly         PEFT's Poly layer: factors mixed for every example by einsum, a bmm over the examples
    loop         PEFT LoRA with an adapter a task, already mixed, and `adapter_names`: a loop over the tasks

routed and poly train the inventory A, B and the logits Z; loop trains the adapters of the tasks, one adapter its own.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from peft import LoraConfig, PolyConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from linlora import functional
from linlora import reference as formulas

from .cases import Case
from .data import RoutedData
from .job import Layer
from .layers import frozen_linear


def frozen(data: RoutedData) -> Layer:
    """The floor."""
    module = frozen_linear(data.weight, data.bias)
    return Layer(module, {}, list(module.parameters()))


def one_adapter(data: RoutedData) -> Layer:
    """PEFT's LoRA layer with the factors of task 0."""
    return _lora(data, [0], lambda layer, x: layer(x))


def loop(data: RoutedData) -> Layer:
    """PEFT's LoRA layer with an adapter a task; `adapter_names` says which example takes which."""
    tasks = data.task_ids.tolist()
    names = [f"task{task}" for task in tasks]
    return _lora(data, sorted(set(tasks)), lambda layer, x: layer(x, adapter_names=names))


def routed(data: RoutedData) -> Layer:
    """linlora's op, from the logits on."""
    case = data.case
    module = frozen_linear(data.weight, data.bias)
    A, B, Z = (nn.Parameter(tensor) for tensor in (data.A, data.B, data.Z))

    def forward(x: Tensor) -> Tensor:
        return functional.routed_lora_linear(
            x, module.weight, module.bias, A, B, mixture(Z, case), 1 / case.rank, data.task_ids
        )

    return Layer(forward, {"A": A, "B": B, "Z": Z}, [*module.parameters(), A, B, Z])


def poly(data: RoutedData) -> Layer:
    """PEFT's Poly layer, its router in evaluation mode: in training it would sample."""
    case = data.case
    config = PolyConfig(
        r=case.rank, n_tasks=case.tasks, n_skills=case.skills, n_splits=case.heads, target_modules=["linear"]
    )
    model = get_peft_model(
        nn.Sequential(OrderedDict(linear=frozen_linear(data.weight, data.bias))), config, autocast_adapter_dtype=False
    )
    layer: Any = model.base_model.model.linear
    trainable = {
        "A": layer.poly_lora_A["default"],
        "B": layer.poly_lora_B["default"],
        "Z": layer.poly_router["default"].module_logits,
    }
    for parameter, value in zip(trainable.values(), (data.A, data.B, data.Z), strict=True):
        parameter.data = value
    layer.eval()
    return Layer(lambda x: layer(x, task_ids=data.task_ids), trainable, list(model.parameters()))


def mixture(Z: Tensor, case: Case) -> Tensor:
    """The weights (T, Q, S) of logits Z (T, Q·S), as Poly and MHR have them: σ(Z) over its sum over the skills."""
    p = torch.sigmoid(Z).view(case.tasks, case.heads, case.skills)
    return p / (p.sum(-1, keepdim=True) + 1e-12)


def reference(function: str, data: RoutedData) -> dict[str, Tensor]:
    """What a provider of `function` has to compute, in float64."""
    case = data.case
    x, weight, A, B, Z = (t.detach().double().requires_grad_() for t in (data.x, data.weight, data.A, data.B, data.Z))
    bias = None if data.bias is None else data.bias.double()
    s = 1 / case.rank
    leaves = {"grad_x": x}
    if function == "frozen":
        y = linear(x, weight, bias)
    elif function in ("plain", "adapters"):
        As, Bs = (factor.detach().double() for factor in task_factors(data))
        tasks = range(1 if function == "plain" else case.tasks)
        own = {f"A{t}": As[t].t() for t in tasks} | {f"B{t}": Bs[t].t() for t in tasks}
        own = {name: factor.requires_grad_() for name, factor in own.items()}
        leaves |= {f"grad_{name}": factor for name, factor in own.items()}
        task_ids = torch.zeros_like(data.task_ids) if function == "plain" else data.task_ids
        A_t, B_t = (torch.stack([own[f"{name}{t}"].t() for t in tasks]) for name in "AB")
        y = formulas.grouped_lora_linear(x, weight, bias, A_t, B_t, task_ids, s)
    else:
        leaves |= {"grad_A": A, "grad_B": B, "grad_Z": Z}
        y = formulas.routed_lora_linear(x, weight, bias, A, B, mixture(Z, case), s, data.task_ids)
    results = {"y": y}
    if case.phase != "forward":
        wanted = list(leaves.values())
        # a task without examples has no gradient, which the gate takes for the zeros that it is
        gradients = torch.autograd.grad(y, wanted, data.cotangents[0].double(), allow_unused=True)
        results |= {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }
    return {name: tensor.detach() for name, tensor in results.items()}


def task_factors(data: RoutedData) -> tuple[Tensor, Tensor]:
    """The mixed factors (T, K, r) and (T, r, N), in the dtype of the layer."""
    A, B = formulas.mix_inventory(data.A.float(), data.B.float(), mixture(data.Z.float(), data.case))
    assert A is not None
    return A.to(data.weight.dtype), B.to(data.weight.dtype)


def _lora(data: RoutedData, tasks: list[int], forward: Any) -> Layer:
    """A PEFT LoRA layer with the adapters of these tasks."""
    config = LoraConfig(r=data.case.rank, lora_alpha=1, target_modules=["linear"])
    base = nn.Sequential(OrderedDict(linear=frozen_linear(data.weight, data.bias)))
    model = get_peft_model(base, config, adapter_name=f"task{tasks[0]}", autocast_adapter_dtype=False)
    for task in tasks[1:]:
        model.add_adapter(f"task{task}", config, autocast_adapter_dtype=False)
    layer: Any = model.base_model.model.linear
    As, Bs = task_factors(data)
    trainable = {}
    for name, factors, modules in (("A", As, layer.lora_A), ("B", Bs, layer.lora_B)):
        for task in tasks:
            modules[f"task{task}"].weight.data = factors[task].t().contiguous()
            trainable[f"{name}{task}"] = modules[f"task{task}"].weight
    layer.eval()
    return Layer(lambda x: forward(layer, x), trainable, list(model.parameters()))
