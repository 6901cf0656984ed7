"""`model(..., adapter_names=[...])`: an adapter, or a mixture of adapters, for every example of a batch.

PEFT hands the names to its layers by hooks, for the time of a call. `serve_rows` takes its place on models with
converted layers. An entry may also be a mapping of names to weights (`linlora.layers.mixtures`), the model may be
training, and blocks that activation checkpointing runs again in backward find the names they had.

In training every adapter gets the gradients of its own rows, and one without rows gets None:

    model.set_requires_grad(["a", "b"])                 # PEFT trains the active adapter alone otherwise
    losses = loss(model(**batch, adapter_names=names))  # one a row
    sum(losses[of_a].mean() ...).backward()             # each adapter's own mean, as if it trained alone
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from threading import Event
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from linlora.layers.lora_linear import ConvertedLoraLinear
from linlora.layers.mixtures import BASE, Rows
from linlora.layers.restoring import leave_to_class, replace_methods

_METHOD = "_enable_peft_forward_hooks"
_CHECKPOINTS = "_gradient_checkpointing_func"


def accept_rows(model: PeftModel) -> None:
    """Let a PEFT model with converted layers take mixtures and training in `adapter_names`; `refuse_rows` undoes it."""
    if hasattr(type(model.base_model), _METHOD):
        replace_methods(model.base_model, {_METHOD: serve_rows})


def refuse_rows(model: PeftModel) -> None:
    """Leave `adapter_names` to PEFT again."""
    leave_to_class(model.base_model, [_METHOD])


@contextmanager
def serve_rows(tuner: nn.Module, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Inside the block the layers of a tuner (a PeftModel's `base_model`) run with the adapters of every row.

    Modules in `modules_to_save` are taken whole, whatever the weight of the adapter they belong to.

    Raises ValueError for adapters that do not exist, in PEFT's words, and for mixtures where a layer cannot mix.
    """
    names = kwargs.get("adapter_names")
    if names is None or kwargs.get("alora_offsets") is not None:
        with getattr(type(tuner), _METHOD)(tuner, *args, **kwargs):
            yield
        return
    rows = Rows.of(names)
    _check(tuner, rows)
    beams = kwargs.get("num_beams")
    of_decoder = rows.repeated(beams) if isinstance(beams, int) and beams > 1 else rows
    in_encoder = _encoder_of(tuner.model) if of_decoder is not rows else set()
    with ExitStack() as until_here:
        _hook((m for m in tuner.modules() if m not in in_encoder), of_decoder, until_here)
        _hook(in_encoder, rows, until_here)
        over = Event()
        until_here.callback(over.set)
        for module in tuner.modules():
            if _CHECKPOINTS in vars(module):
                original = vars(module)[_CHECKPOINTS]
                vars(module)[_CHECKPOINTS] = functools.partial(_checkpoint, original, module, rows, over)
                until_here.callback(vars(module).__setitem__, _CHECKPOINTS, original)
        yield


def _encoder_of(model: Any) -> set[nn.Module]:
    """The modules of an encoder, which beam search runs once for all beams; found as PEFT finds them."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return set() if encoder is None or encoder is model else set(encoder.modules())


def _checkpoint(
    original: Callable, module: nn.Module, rows: Rows, over: Event, function: Callable, *args: Any, **kwargs: Any
) -> Any:
    """Checkpoint a function of a module so that it finds its rows when it runs again, with the forward pass over."""

    def with_rows(*inputs: Any, **options: Any) -> Any:
        with ExitStack() as until_here, rows.kept():
            if over.is_set():
                _hook(module.modules(), rows, until_here)
            return function(*inputs, **options)

    return original(with_rows, *args, **kwargs)


def _hook(modules: Iterable[nn.Module], rows: Rows, until_here: ExitStack) -> None:
    """Give the layers their rows, as each kind of layer takes them."""
    for module in modules:
        given: Any = None
        if isinstance(module, ConvertedLoraLinear):
            given = rows
        elif isinstance(module, LoraLayer):
            given = rows.names
        elif isinstance(module, AuxiliaryTrainingWrapper):
            given = [next((name for name, _ in mixture if name in module._adapters), BASE) for mixture in rows]
        if given is not None:
            handle = module.register_forward_pre_hook(functools.partial(_give, given), with_kwargs=True)
            until_here.callback(handle.remove)


def _give(given: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": given}


def _check(tuner: nn.Module, rows: Rows) -> None:
    layers = [(name.removeprefix("model."), m) for name, m in tuner.named_modules() if isinstance(m, LoraLayer)]
    existing = {name for _, layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
    if unknown := sorted(rows.named - existing):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")  # PEFT's words
    for name, layer in layers:
        if not isinstance(layer, ConvertedLoraLinear) and rows.names is None:
            raise ValueError(
                f"layer '{name}' is a {type(layer).__name__} of PEFT's own, which runs one adapter a row and knows no "
                "weights; give every row one name, or call linlora.accelerate(model), which converts layers added later"
            )
    wholes = [(name, m) for name, m in tuner.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for (name, module), mixture in product(wholes, rows.distinct):
        bring = [adapter for adapter, _ in mixture if adapter in module._adapters]
        if len(bring) > 1:
            raise ValueError(
                f"module '{name.removeprefix('model.')}' was trained whole (modules_to_save) by each of {bring}, and "
                "modules have no mixture; mix adapters of which one at most brings the module"
            )
    if tuner.training and torch.is_grad_enabled():
        _warn_of_frozen(tuner, rows)


def _warn_of_frozen(tuner: nn.Module, rows: Rows) -> None:
    trained = {part for name, p in tuner.named_parameters() if p.requires_grad for part in name.split(".")}
    if frozen := [name for name in rows.adapters if name not in trained]:
        warnings.warn(
            f"adapter_names: the model is training, and nothing of {frozen} is: PEFT trains the active adapter alone. "
            f"model.set_requires_grad({frozen}) lets the rows of the others train them too",
            stacklevel=2,
        )
