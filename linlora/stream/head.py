"""Where a stream ends: at the model's outputs, and before the modules that are trained beside the adapter.

There a DualTensor becomes F = f + J δ, a plain tensor, so that what comes after sees the linearized function: the loss
outside the model, or a classification head that PEFT trains as a whole (`modules_to_save`).
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from linlora.stream.sharded import follow_sharding, forget_sharding
from linlora.stream.tensor import DualTensor, TangentError, collapse, duals


def attach(model: PeftModel) -> None:
    """End the stream of a PEFT model where its users expect plain tensors, and before the hooks of others see it."""
    model.get_base_model().register_forward_hook(collapse_outputs, prepend=True)
    model.get_base_model().register_forward_pre_hook(follow_sharding)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.register_forward_pre_hook(collapse_inputs, with_kwargs=True)


def detach(model: PeftModel) -> None:
    """Undo `attach`. The hooks are found by identity, so that a copy of a model lets go of them too."""
    forget_sharding(model)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def collapse_outputs(module: nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook. A key-value cache among the outputs keeps its tangents: the next token needs them."""
    dual = next(duals(output), None)
    if dual is None or dual.stream.output == "both":
        return output
    loss = output.get("loss") if isinstance(output, dict) else None
    if isinstance(loss, DualTensor):
        raise TangentError(
            f"{type(module).__name__} computes its loss from functions that linlora does not know as losses, so it "
            "would be linearized with the network; leave the labels out and compute the loss from the outputs"
        )
    return collapse(output)


def collapse_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return collapse(args), collapse(kwargs)


_HOOKS = (collapse_outputs, collapse_inputs, follow_sharding)
