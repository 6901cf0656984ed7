"""PEFT's methods that merge and unmerge, on a model with converted layers: they finish, or change nothing.

Checked before the first weight changes: that no other module shares one (linlora.layers.sharing), and that each holds
W + ΔW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from linlora.layers.lora_linear import ConvertedLoraLinear, converted_layers
from linlora.layers.restoring import leave_to_class, replace_methods, restoring, uninterrupted
from linlora.layers.sharing import adapted_layers, refuse_shared
from linlora.layers.weights import rehearse, unfold

REMEDY = "Serve the adapter unmerged (linlora.export), or untie the weights of the base model first"


def guard_merging(model: nn.Module) -> None:
    """Let PEFT's methods of the tuners in a model be those of this file."""
    for tuner in _tuners(model):
        replace_methods(tuner, _METHODS, model)


def unguard_merging(model: nn.Module) -> None:
    """Undo `guard_merging`."""
    for tuner in _tuners(model):
        leave_to_class(tuner, _METHODS)


def _tuners(model: nn.Module) -> Iterator[BaseTuner]:
    return (module for module in model.modules() if isinstance(module, BaseTuner))


def _merge_adapter(
    tuner: Any, model: nn.Module, adapter_names: list[str] | None = None, safe_merge: bool = False
) -> None:
    refuse_shared(model, adapted_layers(model, adapter_names or tuner.active_adapters), "merge_adapter", REMEDY)
    with uninterrupted(), restoring(tuner) as undo:
        for _, layer in converted_layers(tuner):
            undo(_unmerge_to, layer, len(layer.folds))
        type(tuner).merge_adapter(tuner, adapter_names, safe_merge)


def _unmerge_to(layer: ConvertedLoraLinear, folds: int) -> None:
    while len(layer.folds) > folds:
        unfold(layer.get_base_layer().weight.data, layer.folds.pop())


def _unmerge_adapter(tuner: Any, model: nn.Module) -> None:
    with uninterrupted():
        type(tuner).unmerge_adapter(tuner)


def _merge_and_unload(
    tuner: Any,
    model: nn.Module,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    adapters = adapter_names or tuner.active_adapters
    refuse_shared(model, adapted_layers(model, adapters), "merge_and_unload", REMEDY)
    with uninterrupted(), restoring(tuner):
        for _, layer in converted_layers(tuner):
            names = [name for name in adapters if name in layer.lora_A and name not in layer.merged_adapters]
            if names:
                rehearse(layer.get_base_layer().weight.data, layer.update_that_fits(names))
        return type(tuner).merge_and_unload(tuner, progressbar, safe_merge, adapter_names)


_METHODS: dict[str, Callable[..., Any]] = {
    "merge_adapter": _merge_adapter,
    "unmerge_adapter": _unmerge_adapter,
    "merge_and_unload": _merge_and_unload,
}
