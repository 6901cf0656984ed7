"""`restoring`: a function that changes a model in place finishes, or leaves it as it was."""

from __future__ import annotations

import copy
import functools
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def restoring(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Put a model back, and let the error through, where the block raises.

    Put back are, of every module: its class, its attributes, with the contents of dicts, lists and sets (submodules,
    parameters, hooks, states); of every parameter: its tensor and `requires_grad`, and of those of an adapter
    ('lora_' in the name) the values. Values of base weights are not copied: who changes one in place calls the function
    that the context gives with what undoes the change. These run first, the last one first.

    >>> model = nn.Linear(2, 2)
    >>> try:
    ...     with restoring(model):
    ...         _ = model.requires_grad_(False)
    ...         model.bias = None
    ...         raise ValueError
    ... except ValueError:
    ...     model.bias.requires_grad
    True
    """
    modules = [(module, type(module), _contents(vars(module))) for module in model.modules()]
    named = model.named_parameters(remove_duplicate=True)
    parameters = [(p, p.data, p.requires_grad, p.data.clone() if "lora_" in name else None) for name, p in named]
    undo = ExitStack()
    try:
        yield undo.callback
    except BaseException:
        undo.close()
        for module, kind, contents in modules:
            module.__class__ = kind
            for container, was in contents:
                _refill(container, was)
        for parameter, tensor, requires_grad, values in parameters:
            _put_back(parameter, tensor, values)
            parameter.requires_grad_(requires_grad)
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let an interrupt (Ctrl-C) wait until the block is done; for changes that nothing undoes.

    >>> with uninterrupted():
    ...     print("whole")
    whole
    """
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield  # interrupts go to the main thread, or nowhere
        return
    waiting: list[tuple[int, Any]] = []
    handler: Any = signal.signal(signal.SIGINT, lambda *interrupt: waiting.append(interrupt))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])


def replace_methods(model: nn.Module, methods: Mapping[str, Callable[..., Any]], *first: Any) -> None:
    """Let functions of (model, *first, ...) take the place of methods, by name; `leave_to_class` undoes it."""
    for name, method in methods.items():
        vars(model)[name] = functools.partial(method, model, *first)


def leave_to_class(model: nn.Module, methods: Iterable[str]) -> None:
    """Let methods be those of the model's class again."""
    for name in methods:
        vars(model).pop(name, None)


def _contents(attributes: dict) -> list[tuple[Any, Any]]:
    """A module's attributes and those among them that can be changed in place, each with a copy."""
    kinds = (dict, OrderedDict, list, set)
    return [(it, copy.copy(it)) for it in (attributes, *attributes.values()) if type(it) in kinds]


def _refill(container: Any, was: Any) -> None:
    container.clear()
    container.extend(was) if isinstance(was, list) else container.update(was)


@torch.no_grad()
def _put_back(parameter: Tensor, tensor: Tensor, values: Tensor | None) -> None:
    if parameter.data.shape != tensor.shape or parameter.data.data_ptr() != tensor.data_ptr():
        parameter.data = tensor
    if values is not None:
        parameter.data.copy_(values)
