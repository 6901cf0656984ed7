"""Which of PEFT's LoRA layers run here, and their change of class: into a fused layer, in place, and back."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from linlora.layers.calls import LINEAR, follow_class, has_forward_of_class
from linlora.layers.lora_linear import FusedLoraLinear
from linlora.layers.peft_names import ChangesOfB
from linlora.layers.quantized import QuantizedLoraLinear, quantized
from linlora.layers.vanilla import not_vanilla_layer


def fuse_layer(layer: LoraLayer, name: str) -> FusedLoraLinear:
    """Turn a PEFT LoRA linear layer into a FusedLoraLinear, in place, with every adapter plain."""
    fused: Any = layer
    if not isinstance(layer, FusedLoraLinear):
        if quantized(layer):
            fused.peft_class = type(layer)
            fused.__class__ = QuantizedLoraLinear
        else:
            fused.__class__ = FusedLoraLinear
        follow_class(fused)
        fused.lora_dA, fused.of_lora_B = nn.ParameterDict(), ChangesOfB(name)
        fused.states, fused.stream, fused.folds = {}, None, []
    fused.layer_name = name
    for adapter in fused.lora_A:
        fused.states.setdefault(adapter, "plain")
    return fused


def unfuse_layer(layer: FusedLoraLinear) -> None:
    """Turn a FusedLoraLinear back into the PEFT layer it was, in place; the adapters must be plain."""
    for attribute in ("lora_dA", "of_lora_B", "states", "stream", "folds", "layer_name"):
        delattr(layer, attribute)
    layer.__dict__.pop("mixed", None)
    layer.__class__ = layer.__dict__.pop("peft_class", PeftLoraLinear)
    follow_class(layer)


def unsupported(layer: Any) -> str | None:
    """Why a PEFT LoRA layer cannot run on the fused op, or None. The generic class is matched exactly on purpose:
    a subclass is a variant whose forward we do not know."""
    if isinstance(layer, FusedLoraLinear):
        return None
    if type(layer) is not PeftLoraLinear and not quantized(layer):
        return (
            f"it is a {type(layer).__module__}.{type(layer).__name__}; LoRA over nn.Linear and Conv1D is fused, and "
            "over layers quantized by bitsandbytes or torchao"
        )
    if not has_forward_of_class(layer):
        return (
            "its forward was replaced on the instance, and would be called in place of the fused one; put that back "
            "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), and replace it afterwards"
        )
    base = layer.base_layer
    if not quantized(layer) and type(base) not in LINEAR:
        return f"its base layer is a {type(base).__name__}; only nn.Linear and transformers' Conv1D are fused"
    return not_vanilla_layer(layer, list(layer.lora_A))  # PEFT may keep the options of an adapter that was deleted
