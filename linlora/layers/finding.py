"""The LoRA layers of a model, found and checked before one is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from linlora.layers.conversion import unsupported
from linlora.layers.peft_names import base_name
from linlora.layers.report import last_names
from linlora.layers.sharding import check_weight
from linlora.layers.vanilla import not_vanilla_config
from linlora.storage.tensors import finite


class UnsupportedLayerError(TypeError):
    """A LoRA layer of the model cannot be linearized; the message names each with the reason and the remedy."""


class NoLoraLayerError(ValueError):
    """The model holds no LoRA layer; the message lists the layers LoRA could be put on."""


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name in the base model, layer) of every LoRA layer; raises when there is none, or one that is not supported."""
    layers = [(base_name(name), module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if not layers:
        candidates = last_names(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        raise NoLoraLayerError(
            f"{type(model).__name__} has no LoRA layer. Linear layers LoraConfig(target_modules=[...]) could name: "
            f"{', '.join(candidates) or 'none'}"
        )
    configs = getattr(model, "peft_config", {}).items()
    asked = [(f"adapter '{name}'", not_vanilla_config(config, in_its_model=True)) for name, config in configs]
    asked += [(f"'{name}'", unsupported(layer)) for name, layer in layers]
    if refused := [f"  {which}: {why}" for which, why in asked if why is not None]:
        raise UnsupportedLayerError(
            "these LoRA layers cannot be linearized; leave them out of target_modules (or list them in "
            "exclude_modules), or create them as vanilla LoRA:\n" + "\n".join(refused)
        )
    check_unmerged(layers)
    return layers


def check_unmerged(layers: Iterable[tuple[str, Any]]) -> None:
    """Raise a ValueError where adapters are merged into one of these layers."""
    for name, layer in layers:
        if layer.merged_adapters:
            raise ValueError(
                f"layer '{name}': adapters {layer.merged_adapters} are merged; call model.unmerge_adapter()"
            )


def check_factors(name: str, layer: Any) -> None:
    """Raise where the factors of a layer's adapters are no parameters, or have no values."""
    for kind in ("lora_A", "lora_B"):
        for adapter, part in getattr(layer, kind).items():
            check_weight(f"layer '{name}'", f"{kind}['{adapter}']", part, error=UnsupportedLayerError)
            if not finite(part.weight):
                raise ValueError(f"layer '{name}': {kind} of adapter '{adapter}' holds NaN or infinity")
