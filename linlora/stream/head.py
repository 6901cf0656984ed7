"""The ends of a stream: the model's outputs, and the inputs of modules that are trained beside the adapter.

There a DualTensor becomes F = f + J δ, a plain tensor, so that what comes after sees the linearized function: the loss
outside the model, or a classification head that PEFT trains as a whole (`modules_to_save`). What leaves the network by
another way is F to whoever uses it (linlora.stream.outside).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from linlora.stream import border, evaluation
from linlora.stream.outside import refuse_loss
from linlora.stream.sharded import follow_sharding, is_boundary
from linlora.stream.tensor import DualTensor, Stream, collapse
from linlora.stream.trees import replaced


def attach(model: PeftModel, stream: Stream) -> None:
    """End the stream of a PEFT model where its users expect plain tensors, and before the hooks of others see it.

    PEFT up to 0.20 calls the base model's forward past its hooks, so the PEFT model has them too.
    """
    base = model.get_base_model()
    border.mark(base, stream)
    stream.bordered = True
    for network in dict.fromkeys((model, base)):
        network.register_forward_pre_hook(evaluation.begin)
        network.register_forward_hook(evaluation.end, prepend=True, always_call=True)
        network.register_forward_hook(collapse_outputs, prepend=True)
    base.register_forward_pre_hook(follow_sharding)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.register_forward_pre_hook(collapse_inputs, with_kwargs=True)


def detach(model: PeftModel) -> None:
    """Undo `attach`. The hooks are found by what they call, so that a copy of a model lets go of them too."""
    border.unmark(model)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS or is_boundary(hook)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


@torch.compiler.disable
def collapse_outputs(module: nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook. A key-value cache among the outputs keeps its tangents: the next token needs them."""
    network = type(module).__name__

    def collapsed(x: Tensor, name: str) -> Tensor:
        if not isinstance(x, DualTensor) or x.stream.output == "both":
            return x
        refuse_loss(x, name, network)
        return x if x.unknown else x.taken()

    return replaced(output, collapsed, dataclasses.is_dataclass)


@torch.compiler.disable
def collapse_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return collapse(args), collapse(kwargs)


_HOOKS = (evaluation.begin, evaluation.end, collapse_outputs, collapse_inputs, follow_sharding)
