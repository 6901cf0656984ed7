"""The LoRA layers of a model, found and checked before one is changed."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from linlora.layers.conversion import unsupported
from linlora.layers.report import last_names
from linlora.layers.sharding import check_there
from linlora.layers.vanilla import not_vanilla_config


class UnsupportedLayerError(TypeError):
    """A LoRA layer of the model cannot be linearized; the message names each with the reason and the remedy."""


class NoLoraLayerError(ValueError):
    """The model holds no LoRA layer; the message lists the layers LoRA could be put on."""


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name in the base model, layer) of every LoRA layer; raises when there is none, or one that is not supported."""
    layers = [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
    if not layers:
        candidates = last_names(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        raise NoLoraLayerError(
            f"{type(model).__name__} has no LoRA layer. Linear layers LoraConfig(target_modules=[...]) could name: "
            f"{', '.join(candidates) or 'none'}"
        )
    configs = getattr(model, "peft_config", {})
    refused = [
        f"  adapter '{name}': {why}" for name, c in configs.items() if (why := not_vanilla_config(c, True)) is not None
    ]
    refused += [f"  '{name}': {why}" for name, layer in layers if (why := unsupported(layer)) is not None]
    if refused:
        raise UnsupportedLayerError(
            "these LoRA layers cannot be linearized; leave them out of target_modules (or list them in "
            "exclude_modules), or create them as vanilla LoRA:\n" + "\n".join(refused)
        )
    for name, layer in layers:
        if layer.merged_adapters:
            raise ValueError(
                f"layer '{name}': adapters {layer.merged_adapters} are merged; call model.unmerge_adapter()"
            )
    return layers


def check_factors(name: str, layer: Any) -> None:
    """Raise where the factors of a layer's adapters are no parameters, or have no values."""
    for adapter in layer.lora_A:
        computed = [kind for kind in ("lora_A", "lora_B") if "weight" not in getattr(layer, kind)[adapter]._parameters]
        if computed:
            raise UnsupportedLayerError(
                f"layer '{name}': the weight of {computed[0]}['{adapter}'] is computed on every call (a "
                "parametrization, weight_norm, pruning); make it a parameter first "
                "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove)"
            )
        factors = [(f"lora_{kind}", getattr(layer, f"lora_{kind}")[adapter].weight) for kind in "AB"]
        check_there(f"layer '{name}'", [(f"{kind} of adapter '{adapter}'", factor) for kind, factor in factors])
        for kind, factor in factors:
            if not torch.isfinite(factor).all():
                raise ValueError(f"layer '{name}': {kind} of adapter '{adapter}' holds NaN or infinity")
