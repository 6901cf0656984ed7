"""Turns model scope on and off for a linearized PEFT model, and checks that it is exact there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from linlora.layers.peft_names import base_name
from linlora.layers.sharding import check_there
from linlora.stream import Stream, head
from linlora.stream.modules import convert_modules, restore_modules

_ATTENTION = ("eager", "sdpa")


def enter_model_scope(model: Any) -> tuple[str, ...]:
    """Give every linearized layer the stream of the model; returns the names of the modules that run as one op."""
    stream = Stream()
    for module in _layers(model):
        module.stream = stream
    head.attach(model, stream)
    return tuple(map(base_name, convert_modules(model)))


def leave_model_scope(model: Any) -> None:
    """Undo `enter_model_scope`; nothing to do at layer scope."""
    head.detach(model)
    restore_modules(model)
    for module in _layers(model):
        module.stream = None


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers that both streams run through, of a PEFT model or a routed one: they have a `stream`."""
    return (module for module in model.modules() if "stream" in vars(module))


def check_scope(scope: str) -> None:
    """Raise a ValueError for a scope that does not exist."""
    if scope not in ("layer", "model"):
        raise ValueError(f"unknown scope {scope!r}: choose 'layer' or 'model'")


def check_model_scope(model: PeftModel) -> None:
    """Raise a ValueError, with the remedy, where F = f(φ0) + J δ could not be formed or trained exactly."""
    check_there("model scope", model.named_parameters())
    check_attention(model)
    whole = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
    factors = [p for layer in adapters for name, p in layer.named_parameters() if "lora_" in name]
    check_trained(model, [*factors, *(p for module in whole for p in module.parameters())], "adapter")
    check_order(model, whole, LoraLayer, "adapter")


def check_attention(model: Any) -> None:
    """Raise a ValueError where an attention implementation has no tangent."""
    for name, module in [("", model.get_base_model()), *model.named_modules()]:
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation not in (None, *_ATTENTION):
            raise ValueError(
                f"model scope: attention implementation '{implementation}'{f' of {name!r}' if name else ''} has no "
                "tangent; load the model with attn_implementation='sdpa', which linlora computes with tangents in "
                "O(S) memory, or call model.set_attn_implementation('sdpa')"
            )


def check_trained(model: nn.Module, inside: Iterable[nn.Parameter], part: str) -> None:
    """Raise a ValueError where parameters train that are not among those `inside`, of a model linearized in a part."""
    known = {id(parameter) for parameter in inside}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        raise ValueError(
            f"model scope linearizes in the {part} alone, but {len(others)} other parameters train: "
            f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}. Freeze them (with PEFT, "
            "LoraConfig(bias='none')), or name a head in modules_to_save, which is trained on top of the linearized "
            "features"
        )


def check_order(model: nn.Module, whole: Collection[nn.Module], kind: type[nn.Module], part: str) -> None:
    """Raise a ValueError where a layer of some kind comes after a module trained as a whole, which ends the stream."""
    trained: str | None = None
    for name, module in model.named_modules():
        if module in whole:
            trained = base_name(name)
        elif isinstance(module, kind) and trained is not None:
            raise ValueError(
                f"model scope: '{trained}' is trained as a whole and comes before the {part} of '{base_name(name)}', "
                "so the network is not linear in what trains; take it out of modules_to_save, or use scope='layer'"
            )
