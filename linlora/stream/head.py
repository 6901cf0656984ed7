"""The ends of a stream: the model's outputs, and the inputs of modules that are trained beside the adapter.

There a DualTensor becomes F = f + J δ, a plain tensor, so that what comes after sees the linearized function: the loss
outside the model, or a classification head that PEFT trains as a whole (`modules_to_save`). What leaves the network by
another way is F to whoever uses it (linlora.stream.outside).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from linlora.stream import border, evaluation
from linlora.stream.outside import refuse_loss
from linlora.stream.sharded import follow_sharding, is_boundary
from linlora.stream.tensor import DualTensor, Stream, collapse, rebuilt


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


def collapse_outputs(module: nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook. A key-value cache among the outputs keeps its tangents: the next token needs them."""
    return _collapsed(output, "", type(module).__name__)


def collapse_inputs(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return collapse(args), collapse(kwargs)


_HOOKS = (evaluation.begin, evaluation.end, collapse_outputs, collapse_inputs, follow_sharding)


def _collapsed(tree: Any, name: str, network: str) -> Any:
    """An output with F in the place of its DualTensors, those in dataclasses too; `name` is that of a field or key."""
    if isinstance(tree, DualTensor):
        if tree.stream.output == "both":
            return tree
        refuse_loss(tree, name, network)
        return tree if tree.unknown else tree.taken()
    if isinstance(tree, dict):  # and transformers' ModelOutput, which is one
        items = dict(tree.items())
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        items = {
            field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if hasattr(tree, field.name)
        }
    elif isinstance(tree, (tuple, list)):
        children = [_collapsed(child, name, network) for child in tree]
        unchanged = all(new is old for new, old in zip(children, tree, strict=True))
        return tree if unchanged else rebuilt(tree, children)
    else:
        return tree
    changed = {key: new for key, old in items.items() if (new := _collapsed(old, str(key), network)) is not old}
    if not changed:
        return tree
    replaced = copy.copy(tree)
    for key, child in changed.items():
        if isinstance(tree, dict):
            replaced[key] = child
        else:
            object.__setattr__(replaced, key, child)
    return replaced
