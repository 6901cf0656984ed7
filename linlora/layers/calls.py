"""Calls that a converted layer replaces, and when it may.

PEFT calls `base_layer`, `lora_A`, `lora_B` and `lora_dropout`. A converted layer reads their weights and calls none of
them, which is the same only where a call is the forward of a class this file knows, and nothing else: no hooks, of the
module or of all modules, no forward set on the instance, no parametrization (which changes the class). `is_product` is
the rule. It is asked when a layer is made and on every call, because hooks come and go.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import chain
from types import MethodType
from typing import Any

from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.utils.module_tracker import ModuleTracker
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear, Conv1D)
PATCHED = "the forward of PEFT's LoRA layer was replaced (peft.tuners.lora.layer.Linear.forward)"
_PEFT_FORWARD = PeftLoraLinear.forward
_HOOKS_OF_ALL = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)
_FORWARDS: dict[type, Any] = {kind: kind.forward for kind in (*LINEAR, nn.Dropout, nn.Identity)}


def pefts_forward_is_its_own() -> bool:
    """Whether the forward of PEFT's LoRA layer, which a converted layer replaces, is the one that was imported."""
    return PeftLoraLinear.forward is _PEFT_FORWARD


def is_product(part: nn.Module) -> bool:
    """Whether a call of a part is the product (or the dropout) that its class is for, and nothing else."""
    if _has_hooks(part):
        return False
    known = type(part).forward is _FORWARDS.get(type(part))
    return known and ("forward" not in part.__dict__ or has_forward_of_class(part))


def is_called_plainly(module: nn.Module) -> bool:
    """`is_product` for a class this file does not know: whether a call is the forward of the class alone."""
    return not _has_hooks(module) and has_forward_of_class(module)


def has_forward_of_class(module: nn.Module) -> bool:
    """Whether no forward was set on the instance, but for one that moves the input to the module's device."""
    forward: Any = module.forward
    if getattr(forward, "__self__", None) is not module:
        forward = _beneath_placement(module)
    return forward is not None and forward.__func__ is type(module).forward


def beyond_product(part: nn.Module) -> str:
    """The reason to call a part instead of reading its weight, as the predicate of a sentence."""
    if _has_hooks(part):
        return "has hooks"
    if type(part) not in _FORWARDS:
        return f"is a {type(part).__name__}"
    return (
        "has a forward that was replaced (by accelerate's cpu_offload? "
        "accelerate.hooks.remove_hook_from_module(model, recurse=True) undoes it)"
    )


def hooks_of_all_modules() -> bool:
    """Whether global module hooks wait for every call. Those of torch's ModuleTracker (FlopCounterMode) note names."""
    if not any(_HOOKS_OF_ALL):
        return False
    hooks = chain.from_iterable(each.values() for each in _HOOKS_OF_ALL)
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def _has_hooks(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def follow_class(layer: nn.Module) -> None:
    """After a change of class: let a forward that was kept on the instance, as accelerate keeps it, be the new one."""
    for name in ("_old_forward", "forward"):
        if isinstance(kept := vars(layer).get(name), MethodType) and kept.__self__ is layer:
            setattr(layer, name, MethodType(type(layer).forward, layer))


def _beneath_placement(module: Any) -> Any:
    """The forward beneath one set by accelerate that only moves the input to the device of the module; or None."""
    kept, hook = getattr(module, "_old_forward", None), getattr(module, "_hf_hook", None)
    wraps = isinstance(module.forward, functools.partial) and module.forward.func.__module__ == "accelerate.hooks"
    own = getattr(kept, "__self__", None) is module
    return kept if own and wraps and all(map(_only_places, _each(hook))) else None


def _each(hook: Any) -> Iterable[Any]:
    return hook.hooks if type(hook).__name__ == "SequentialHook" else (hook,)


def _only_places(hook: Any) -> bool:
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload and not hook.no_grad
