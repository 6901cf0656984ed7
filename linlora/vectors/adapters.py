"""Reads the factors of a PEFT adapter, layer by layer, and puts values into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linlora.layers.sharding import check_there, sharded_like, whole
from linlora.layers.vanilla import not_vanilla_config, not_vanilla_layer
from linlora.storage.tensors import finite

if TYPE_CHECKING:
    from peft import PeftModel


def one_adapter(model: PeftModel, adapter: str | None) -> str:
    """The adapter of a name, or the active one. Raises ValueError where that is none, or more than one."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(f"a PeftModel is expected, got {type(model).__name__}")
    names = [adapter] if adapter is not None else list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(f"adapters {names} are active; name one of them with adapter=...")
    if names[0] not in model.peft_config:
        raise ValueError(f"no adapter '{names[0]}'; the model has {sorted(model.peft_config)}")
    return names[0]


def adapter_layers(model: PeftModel, adapter: str) -> list[tuple[str, Any]]:
    """The LoRA layers of an adapter, by their names in the base model.

    Raises ValueError for an adapter that is more than A and B of linear layers, or has no layer.
    """
    from peft.tuners.lora.layer import LoraLayer

    layers: list[tuple[str, Any]] = [
        (path.removeprefix("base_model.model."), module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    ]
    for name, layer in layers:
        why: str | None = f"it is a {type(layer).__module__}.{type(layer).__name__}"
        if adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear):
            why = not_vanilla_layer(layer, [adapter])
        if why is not None:
            raise ValueError(
                f"adapter '{adapter}' has no task vector, which would lose a part of layer '{name}': {why}. A vector "
                "holds vanilla LoRA on linear layers; PEFT's save_pretrained keeps this adapter"
            )
        check_there(f"adapter '{adapter}'", ((n, p) for n, p in layer.named_parameters(name) if "lora_" in n))
    if (why := not_vanilla_config(model.peft_config[adapter])) is not None:
        raise ValueError(f"adapter '{adapter}' has no task vector: {why}. PEFT's save_pretrained keeps this adapter")
    if not layers:
        raise ValueError(f"the model has no LoRA layer with an adapter '{adapter}'")
    return layers


def layers_to_change(model: PeftModel, adapter: str) -> list[tuple[str, Any]]:
    """`adapter_layers`; raises ValueError also for merged ones, out of which PEFT would take what it did not put in."""
    from linlora.layers.finding import check_unmerged

    layers = adapter_layers(model, adapter)
    check_unmerged(layers)
    return layers


def state_of(layer: Any, adapter: str) -> str:
    """The state of an adapter in a LoRA layer (linlora.layers.adapters): "plain", or linearized "short" or "pair"."""
    return getattr(layer, "states", {}).get(adapter, "plain")


def delta_parameters(model: PeftModel, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters that hold an adapter's change, by their names in a TaskVector: '<layer>.dA', '<layer>.dB'.

    In a plain layer they are A and B themselves; a layer linearized at B0 = 0 has dB alone.
    """
    adapter = one_adapter(model, adapter)
    parameters = {}
    for name, layer in adapter_layers(model, adapter):
        pair = state_of(layer, adapter) == "pair"
        if state_of(layer, adapter) != "short":
            parameters[f"{name}.dA"] = layer.lora_dA[adapter] if pair else layer.lora_A[adapter].weight
        parameters[f"{name}.dB"] = layer.lora_dB[adapter] if pair else layer.lora_B[adapter].weight
    return parameters


@dataclass(frozen=True)
class Held:
    """The parts of the task vector of an adapter in a model, copied to the CPU."""

    deltas: dict[str, Tensor]
    point: dict[str, Tensor]
    scalings: dict[str, float]
    scope: str


def held_by(model: PeftModel, adapter: str, start: Mapping[str, Tensor] | None) -> Held:
    """Read the factors of an adapter.

    Args:
        start: for a plain adapter the point its training started from, the adapter's values of now if left out.
    """
    deltas: dict[str, Tensor] = {}
    points: dict[str, Tensor] = {}
    scalings = {}
    scopes = set()
    for name, layer in adapter_layers(model, adapter):
        state = state_of(layer, adapter)
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scopes.add("lora" if state == "plain" else "layer" if layer.stream is None else "model")
        scalings[name] = float(layer.scaling[adapter])
        if state == "short":
            points[f"{name}.A0"], deltas[f"{name}.dB"] = _copy(A), _copy(B)
        elif state == "pair":
            points[f"{name}.A0"], points[f"{name}.B0"] = _copy(A), _copy(B)
            deltas[f"{name}.dA"] = _copy(layer.lora_dA[adapter])
            deltas[f"{name}.dB"] = _copy(layer.lora_dB[adapter])
        else:
            for kind, factor in (("A", A), ("B", B)):
                current, name0 = _copy(factor), f"{name}.{kind}0"
                if start is None:
                    points[name0] = current
                elif name0 in start:
                    points[name0] = start[name0]
                deltas[f"{name}.d{kind}"] = current - points[name0] if name0 in points else current
    if len(scopes) != 1:
        raise ValueError(f"adapter '{adapter}' is linearized in some layers and plain in others: linearize the model")
    return Held(deltas, points, scalings, scopes.pop())


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for NaN or infinity, before a model is changed."""
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise ValueError(f"the vector holds NaN or infinity in '{name}'; the model is unchanged")


def assign(parameter: Tensor, value: Tensor | float, name: str) -> None:
    """Set a parameter, whole or sharded. Raises a ValueError that gives its name for a value of another shape."""
    if isinstance(value, Tensor) and value.shape != parameter.shape:
        raise ValueError(
            f"'{name}' is {tuple(value.shape)} in the vector and {tuple(parameter.shape)} in the model: "
            "their ranks or layer sizes differ; create the adapter with the LoraConfig the vector was trained with"
        )
    with torch.no_grad():
        parameter.fill_(value) if isinstance(value, float) else parameter.copy_(sharded_like(value, parameter))


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).to("cpu", copy=True)
