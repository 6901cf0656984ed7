"""Converts a PEFT LoRA layer, in place and back, by a change of its class; says which layers can be converted."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from linlora.layers.calls import LINEAR, follow_class, has_forward_of_class
from linlora.layers.lora_linear import ConvertedLoraLinear
from linlora.layers.peft_names import ChangesOfB
from linlora.layers.quantized import QuantizedLoraLinear, quantized
from linlora.layers.vanilla import not_vanilla_layer


def convert_layer(layer: LoraLayer, name: str) -> ConvertedLoraLinear:
    """Turn a PEFT LoRA linear layer into a ConvertedLoraLinear, in place, with every adapter plain."""
    converted: Any = layer
    if not isinstance(layer, ConvertedLoraLinear):
        if quantized(layer):
            converted.peft_class = type(layer)
            converted.__class__ = QuantizedLoraLinear
        else:
            converted.__class__ = ConvertedLoraLinear
        follow_class(converted)
        converted.lora_dA, converted.of_lora_B = nn.ParameterDict(), ChangesOfB(name)
        converted.states, converted.stream, converted.folds = {}, None, []
    converted.layer_name = name
    for adapter in converted.lora_A:
        converted.states.setdefault(adapter, "plain")
    return converted


def convert_back(layer: ConvertedLoraLinear) -> None:
    """Turn a ConvertedLoraLinear back into the PEFT layer it was, in place; the adapters must be plain."""
    for attribute in ("lora_dA", "of_lora_B", "states", "stream", "folds", "layer_name"):
        delattr(layer, attribute)
    layer.__dict__.pop("mixed", None)
    layer.__class__ = layer.__dict__.pop("peft_class", PeftLoraLinear)
    follow_class(layer)


def unsupported(layer: Any) -> str | None:
    """Why a PEFT LoRA layer cannot be converted, or None. Only exact classes can: subclasses may compute anything."""
    if isinstance(layer, ConvertedLoraLinear):
        return None
    if type(layer) is not PeftLoraLinear and not quantized(layer):
        return (
            f"it is a {type(layer).__module__}.{type(layer).__name__}; LoRA over nn.Linear and Conv1D is converted, "
            "and over layers quantized by bitsandbytes or torchao"
        )
    if not has_forward_of_class(layer):
        return (
            "its forward was replaced on the instance, and would be called in place of linlora's; put that back "
            "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), and replace it afterwards"
        )
    base = layer.base_layer
    if not quantized(layer) and type(base) not in LINEAR:
        return f"its base layer is a {type(base).__name__}; only nn.Linear and transformers' Conv1D are converted"
    return not_vanilla_layer(layer, list(layer.lora_A))  # PEFT may keep the options of an adapter that was deleted
