"""The code that calls a torch function on a DualTensor: its module, the function's name, what a message recommends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn

from linlora.stream.errors import TangentError


def refuse_inside_function(where: str, otherwise: str = "use scope='layer'") -> None:
    """Raise where an autograd Function is calling: its backward is its own, and no tangent follows from it."""
    for frame in stack():
        if frame.f_code is torch.autograd.Function.apply.__func__.__code__:  # type: ignore[attr-defined]
            name = frame.f_locals["cls"].__name__
            instead = f"replace it by torch functions, {remedy(otherwise)}"
            if name == "CheckpointFunction":
                instead = "checkpoint with use_reentrant=False (gradient_checkpointing_kwargs)"
            raise TangentError(f"{where}: called by the autograd Function {name}, whose tangent is unknown; {instead}")


def where(func: Any = None) -> str:
    """The innermost module of the model that is running, and the function it called, for messages and reports."""
    function = "" if func is None else f", function '{function_name(func)}'"
    return f"module '{module_name()}'{function}"


def function_name(func: Any) -> str:
    """'softmax' of torch.softmax or Tensor.softmax; 'T' of the getter of a property; 'library::op' of an operator."""
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.name
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name
    name = getattr(func, "__name__", None) or str(func)
    return func.__self__.__name__ if name == "__get__" else name


def remedy(otherwise: str = "use scope='layer'") -> str:
    """The end of a message about a function that cannot be followed; `otherwise` is the advice of a stream."""
    if "expert" in module_name().lower():
        return (
            "or load the model with experts_implementation='batched_mm' (or 'eager'), whose functions are followed; "
            f"else {otherwise}"
        )
    return f"or {otherwise}"


def module_name() -> str:
    """The name, in the model, of the innermost nn.Module whose method is on the call stack."""
    modules = list(running_modules())
    if not modules:
        return "(outside a module)"
    inner, outer = modules[0], modules[-1]
    names = {id(module): name for name, module in outer.named_modules()}
    return names.get(id(inner), "").removeprefix("base_model.model.") or type(inner).__name__


def called_by(module: ModuleType) -> bool:
    """Whether it is code of this module of Python that calls a torch function, whose rule calls this."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _name(frame).startswith(("linlora.stream", "torch._dynamo")):
        frame = frame.f_back
    return _name(frame) == module.__name__


def _name(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def running_modules() -> Iterator[nn.Module]:
    """The modules whose methods are on the call stack, from the innermost outwards."""
    for frame in stack():
        if frame.f_code.co_argcount:
            owner = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(owner, nn.Module):
                yield owner


def stack() -> Iterator[FrameType]:
    """The frames on the call stack, from the caller of the function that asks outwards."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
