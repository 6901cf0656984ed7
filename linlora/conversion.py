"""Which of PEFT's LoRA layers run here, and their change of class: into a fused layer, in place, and back."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from linlora.modules import FusedLoraLinear
from linlora.quantized import QuantizedLoraLinear, quantized
from linlora.vanilla import not_vanilla_layer


def fuse_layer(layer: LoraLayer, name: str) -> FusedLoraLinear:
    """Turn a PEFT LoRA linear layer into a FusedLoraLinear, in place, with every adapter plain."""
    fused: Any = layer
    if not isinstance(layer, FusedLoraLinear):
        if quantized(layer):
            fused.peft_class = type(layer)
            fused.__class__ = QuantizedLoraLinear
        else:
            fused.__class__ = FusedLoraLinear
        fused.lora_dA, fused.lora_dB = nn.ParameterDict(), nn.ParameterDict()
        fused.states, fused.stream, fused.folds = {}, None, []
    fused.layer_name = name
    for adapter in fused.lora_A:
        fused.states.setdefault(adapter, "plain")
    return fused


def unfuse_layer(layer: FusedLoraLinear) -> None:
    """Turn a FusedLoraLinear back into the PEFT layer it was, in place; the adapters must be plain."""
    for attribute in ("lora_dA", "lora_dB", "states", "stream", "folds", "layer_name"):
        delattr(layer, attribute)
    layer.__class__ = layer.__dict__.pop("peft_class", PeftLoraLinear)


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
    base = layer.base_layer
    plain = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, Conv1D)
    if not quantized(layer) and type(base) not in plain:
        return f"its base layer is a {type(base).__name__}; only nn.Linear and transformers' Conv1D are fused"
    return not_vanilla_layer(layer, list(layer.lora_A))  # PEFT may keep the options of an adapter that was deleted
