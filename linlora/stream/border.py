"""Whether code runs inside the network that is linearized, in a hook of one of its modules, or outside.

The call stack knows, and no way of calling a network gets round it: `model(x)`, `model.forward(x)`, a method such as
`get_image_features`, a submodule by itself, the recomputation of a checkpoint in the backward, another thread. Inside
is what a method of one of the network's modules called. `entered` is the short way to that answer for ordinary calls:
it notes the frame in which PyTorch runs the forward and the hooks of the whole network.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from enum import Enum
from threading import local
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from linlora.stream.errors import TangentError

_MARK = "linlora_stream"


class Place(Enum):
    NETWORK = "network"
    HOOK = "hook"
    OUTSIDE = "outside"


def mark(network: nn.Module, stream: Any) -> None:
    """Let every module of a network be known as one of the network of `stream`."""
    for module in network.modules():
        vars(module)[_MARK] = stream


def unmark(network: nn.Module) -> None:
    for module in network.modules():
        vars(module).pop(_MARK, None)


def inside(stream: Any) -> bool:
    """Whether the network of a stream is running the code that calls this, be it in a hook of one of its modules."""
    if not stream.bordered:
        return True
    frames = getattr(_entered, "frames", ())
    return (bool(frames) and any(id(frame) in frames for frame in _stack())) or place(stream) is not Place.OUTSIDE


def place(stream: Any) -> Place:
    """Where the code that calls this is. A user's hook is told from a forward by the line that calls it."""
    if not stream.bordered:
        return Place.NETWORK
    for frame in _stack():
        if _network(_owner(frame)) is stream:
            lines = _FORWARD_LINES.get(frame.f_code)
            return Place.NETWORK if lines is None or frame.f_lineno in lines else Place.HOOK
    return Place.OUTSIDE


def without_input_gradient(x: Tensor, stream: Any) -> Tensor:
    """The input of an adapter; its backward raises where the inputs of the network ask for a gradient."""
    return _NoInputGradient.apply(x) if _asks_for_gradient(inputs(stream)) else x


def inputs(stream: Any) -> list[Any]:
    """The arguments of the outermost call of the network that is running, and of a forward called past the hooks
    without the leaves that `enable_input_require_grads` makes of embeddings, which take the place of arguments."""
    outermost = [frame for frame in _stack() if _network(_owner(frame)) is stream][-1:]
    for frame in outermost:
        code, values = frame.f_code, frame.f_locals
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        found = [values[name] for name in code.co_varnames[:count] if name in values and name != "self"]
        if code is nn.Module._wrapped_call_impl.__code__ or not _makes_leaves(_owner(frame)):
            return found
        return [x for x in found if not (isinstance(x, Tensor) and x.is_leaf)]
    return []


@torch.compiler.disable
def entered(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook of the whole network: the frame that called it is inside until `left`."""
    stack = list(_stack())
    running = {id(frame) for frame in stack}
    kept = running & getattr(_entered, "frames", set())  # an interrupt may have left others behind
    _entered.frames = kept | {
        id(frame) for frame in stack[:4] if frame.f_code in _FORWARD_LINES and _owner(frame) is module
    }


@torch.compiler.disable
def left(module: nn.Module) -> None:
    """The end of `entered`, in a forward hook: what hooks come after it are outside."""
    for frame in _stack():
        if frame.f_code in _FORWARD_LINES and _owner(frame) is module:
            getattr(_entered, "frames", set()).discard(id(frame))
            return


_entered = local()


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _network(module: Any) -> Any:
    return vars(module).get(_MARK) if isinstance(module, nn.Module) else None


def _owner(frame: FrameType) -> Any:
    """The `self` of a method, or of the method that a function was made in."""
    code = frame.f_code
    named = "self" in code.co_varnames[: code.co_argcount] or "self" in code.co_freevars
    return frame.f_locals.get("self") if named else None


def _makes_leaves(network: Any) -> bool:
    names = ("make_inputs_require_grads", "make_inputs_require_grad")  # of transformers and PEFT
    hooks = (hook for module in network.modules() for hook in module._forward_hooks.values())
    return any(getattr(hook, "__name__", "") in names for hook in hooks)


def _forward_lines() -> dict[CodeType, set[int]]:
    """The lines that call the forward, in the functions of PyTorch that run a module's forward and its hooks."""
    call = nn.Module._call_impl.__code__
    found: dict[CodeType, set[int]] = {}
    for code in (call, *(inner for inner in call.co_consts if isinstance(inner, CodeType))):
        starts, line = dict(dis.findlinestarts(code)), 0
        for instruction in dis.get_instructions(code):
            line = starts.get(instruction.offset, line) or line
            if instruction.argval == "forward_call":
                found.setdefault(code, set()).add(line)
    return found


_FORWARD_LINES = _forward_lines()


def _asks_for_gradient(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return type(tree) is Tensor and tree.requires_grad
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return any(_asks_for_gradient(child) for child in children)


class _NoInputGradient(torch.autograd.Function):
    """The identity, of inputs that ask for a gradient. F's depends on the tangents, which have no graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        raise TangentError(
            "model scope: the model's inputs ask for a gradient, and backward would give them f(φ0)'s in place of "
            "F's; detach them, ask for the adapter's gradients alone (torch.autograd.grad), or use scope='layer'"
        )
