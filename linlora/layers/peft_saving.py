"""PEFT's own ways to add, save, copy and combine an adapter, on a model with converted layers: exact, or refused.

They take `lora_A` and `lora_B` for the adapter. Of one that started at B0 != 0 those are the linearization point, and
what training changed lies beside them. Saving gets the exact stock factors (linlora.layers.folding); functions of PEFT
that would combine or copy the point without a word are refused when they ask the model.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from linlora.layers.folding import folded_configs, folded_state_dict
from linlora.layers.lora_linear import converted_layers
from linlora.layers.peft_names import DELTAS
from linlora.layers.restoring import leave_to_class, replace_methods, restoring
from linlora.layers.vanilla import changes_base


def guard_saving(model: PeftModel) -> None:
    """Let PEFT's methods that add, save, copy and combine adapters be those of this file, where they need to be."""
    replace_methods(model, _ADD)
    if _pairs(model):
        replace_methods(model, _SAVE)
        replace_methods(model.base_model, _COMBINE)


def unguard_saving(model: PeftModel) -> None:
    """Undo `guard_saving`."""
    leave_to_class(model, _ADD | _SAVE)
    leave_to_class(model.base_model, _COMBINE)


def _pairs(model: nn.Module) -> list[str]:
    """The adapters that started at B0 != 0."""
    return sorted({adapter for _, layer in converted_layers(model) for adapter in layer.pairs})


def _save_pretrained(model: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.save_pretrained` of a linearized model: the exact stock factors and the config that fits them."""
    for name, config in model.peft_config.items():
        if changes_base(config.init_lora_weights):
            warnings.warn(
                f"save_pretrained: adapter '{name}' was started by '{config.init_lora_weights}', which changed the "
                "base weights, and the files hold factors for the changed ones: they resume this training, and are no "
                "adapter of the original model. linlora.merge(model) gives the whole model",
                stacklevel=2,
            )
    if kwargs.get("path_initial_model_for_weight_conversion") is not None:
        raise ValueError(
            "save_pretrained: path_initial_model_for_weight_conversion subtracts a start from (A, B), and the files of "
            "an adapter linearized at B0 != 0 hold (A', B') of twice the rank. Save without it"
        )
    state_dict = folded_state_dict(model, kwargs.pop("state_dict", None))
    with folded_configs(model):
        type(model).save_pretrained(model, save_directory, *args, state_dict=state_dict, **kwargs)


def _state_dict(model: PeftModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The model's own; to PEFT's `get_peft_model_state_dict`, which asks without arguments, the exact stock factors."""
    state_dict = type(model).state_dict(model, *args, **kwargs)
    of_peft = sys._getframe(1).f_globals.get("__name__") == "peft.utils.save_and_load"
    return folded_state_dict(model, state_dict) if of_peft else state_dict


def _named_modules(model: PeftModel, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
    """The model's own; refused to a `get_peft_model_state_dict` that was given a state dict which is not folded.

    Another model would take A and B of the point from it, and leave dA and dB out.
    """
    caller = sys._getframe(1)
    if caller.f_code.co_name == "get_peft_model_state_dict":
        given: dict[str, Tensor] = caller.f_locals.get("state_dict") or {}
        if any(f".{kind}." in key for key in given for kind in DELTAS):
            raise ValueError(
                f"get_peft_model_state_dict: in the state_dict it was given, A and B of {_pairs(model)} are the "
                "linearization point without what training changed. Call it without a state_dict, or "
                "linlora.export(model, folder)"
            )
    return type(model).named_modules(model, *args, **kwargs)


def _add_adapter(model: PeftModel, *args: Any, **kwargs: Any) -> None:
    """The model's own, or nothing; refused to PEFT's `reduce_intruder_dimension`, which copies A and B into the new."""
    if sys._getframe(1).f_code.co_name == "reduce_intruder_dimension":
        if pairs := _pairs(model):
            raise ValueError(
                f"reduce_intruder_dimension: it copies lora_A and lora_B, which of {pairs} are the linearization point "
                "without what training changed. linlora.export(model, folder), and reduce the adapter that PEFT loads"
            )
        if any(layer.stream is not None for _, layer in converted_layers(model)):
            raise ValueError(
                "reduce_intruder_dimension: it changes ΔW, and a network linearized as a whole has none; "
                "linlora.set_scope(model, 'layer') gives it one"
            )
    with restoring(model):
        type(model).add_adapter(model, *args, **kwargs)


def _load_adapter(model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """The model's own, or nothing: where one layer refuses, the others are without the adapter too."""
    with restoring(model):
        return type(model).load_adapter(model, *args, **kwargs)


def _add_weighted_adapter(
    tuner: Any, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd",
    *args: Any, **kwargs: Any,
) -> None:  # fmt: skip
    """PEFT's, where it is of the ΔW of the adapters; its other combinations are of lora_A and lora_B alone."""
    pairs = [name for name in adapters if name in _pairs(tuner)]
    if pairs and (len(adapters) == 1 or not combination_type.endswith("svd")):
        raise ValueError(
            f"add_weighted_adapter: '{combination_type}' of {len(adapters)} adapters combines lora_A and "
            f"lora_B, which of {pairs} are the linearization point without what training changed. Combine the task "
            "vectors, linlora.fuse([TaskVector.from_model(model, name), ...]), or two adapters and more by 'svd'"
        )
    type(tuner).add_weighted_adapter(tuner, adapters, weights, adapter_name, combination_type, *args, **kwargs)


_ADD: dict[str, Callable[..., Any]] = {"add_adapter": _add_adapter, "load_adapter": _load_adapter}
_SAVE: dict[str, Callable[..., Any]] = {
    "save_pretrained": _save_pretrained, "state_dict": _state_dict, "named_modules": _named_modules
}  # fmt: skip
_COMBINE: dict[str, Callable[..., Any]] = {"add_weighted_adapter": _add_weighted_adapter}
