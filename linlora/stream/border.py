"""Whether code runs inside the network that is linearized, in a hook of one of its modules, or outside.

A tensor of the stream means f with its tangent inside, and F to everybody else, so each torch function asks where it
was called. A flag that hooks set would not do: forwards are called past their hooks (`model.forward(x)`, a method such
as `get_image_features`, a submodule, the recomputation of a checkpoint in the backward), forwards of two networks are
nested in one another, and an interrupt leaves a flag set. The call stack is right in all of these, in every thread:
inside is what a method of one of the network's modules called.

PyTorch runs a module's forward and its hooks from one function. The line of that function that is running tells them
apart, and the lines that call the forward are read from its bytecode, because their numbers change with its version.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from linlora.stream.caller import stack
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
    return place(stream) is not Place.OUTSIDE


def place(stream: Any) -> Place:
    """The place of the code that calls this. A user's hook is told from a forward by the line that calls it."""
    if not stream.bordered:
        return Place.NETWORK
    for frame in stack():
        if _network(_owner(frame)) is stream:
            lines = next((lines for code, lines in _FORWARD_LINES if frame.f_code is code), None)
            return Place.NETWORK if lines is None or frame.f_lineno in lines else Place.HOOK
    return Place.OUTSIDE


def refuse_blocks(stream: Any) -> None:
    """Raise where the network was called past its hooks without gradients, by code that has torch.no_grad() blocks.

    Whether the code is in one of them cannot be seen there, and what it computes in a block is a constant to F.
    """
    frames = list(stack())
    last = max((n for n, frame in enumerate(frames) if _network(_owner(frame)) is stream), default=-1)
    for n, frame in enumerate(frames[: last + 1]):
        code = frame.f_code
        # a method such as predict(), with all of the forward in its block, is only around the network
        around = n == last and code.co_name != "forward"
        of_libraries = frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "linlora")
        if not around and not of_libraries and not _GRAD_MODES.isdisjoint(code.co_names):
            raise TangentError(
                f"the network's '{code.co_name}' has torch.no_grad() blocks of its own, which cannot be told from the "
                "caller's where it is called past its hooks without gradients; call the model, model(...), in place of "
                "model.forward(...) or a method of its, or call it with gradients enabled"
            )


_GRAD_MODES = {"no_grad", "inference_mode", "set_grad_enabled"}


def without_input_gradient(x: Tensor, stream: Any) -> Tensor:
    """The input of an adapter; its backward raises where the inputs of the network ask for a gradient."""
    asks = any(type(leaf) is Tensor and leaf.requires_grad for leaf in tensors(inputs(stream)))
    return _NoInputGradient.apply(x) if asks else x


def inputs(stream: Any) -> list[Any]:
    """The arguments of the outermost call of the network that is running, and of a forward called past the hooks
    without the leaves that `enable_input_require_grads` makes of embeddings, which take the place of arguments."""
    outermost = [frame for frame in stack() if _network(_owner(frame)) is stream][-1:]
    for frame in outermost:
        code, values = frame.f_code, frame.f_locals
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        found = [values[name] for name in code.co_varnames[:count] if name in values and name != "self"]
        if code is nn.Module._wrapped_call_impl.__code__ or not _makes_leaves(_owner(frame)):
            return found
        return [x for x in found if not (isinstance(x, Tensor) and x.is_leaf)]
    return []


def _network(module: Any) -> Any:
    return vars(module).get(_MARK) if isinstance(module, nn.Module) else None


def _owner(frame: FrameType) -> Any:
    """The module whose method runs, or a function made in one: its `self`, or under another name the module that the
    method is of. Other functions of a module are not of the network: `def features(network, x)` is its user's."""
    code = frame.f_code
    names = code.co_varnames[: bool(code.co_argcount)] + code.co_freevars
    if "self" in names:
        return frame.f_locals.get("self")
    if not names:
        return None
    for value in (frame.f_locals.get(name) for name in names):
        if _network(value) is not None and _is_method(code, value):
            return value
    return None


def _is_method(code: CodeType, module: Any) -> bool:
    return getattr(module.forward, "__code__", None) is code or id(code) in _codes(type(module))  # type: ignore[arg-type]


@cache
def _codes(kind: Any) -> dict[int, CodeType]:
    """The code of the methods of a class, of what they decorate and of the functions made in them."""
    waiting = [value for base in kind.__mro__ if base is not object for value in vars(base).values()]
    found: dict[int, CodeType] = {}
    while waiting:
        value = waiting.pop()
        code = value if isinstance(value, CodeType) else getattr(value, "__code__", None)
        if isinstance(code, CodeType) and id(code) not in found:
            found[id(code)] = code
            waiting.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        if not isinstance(value, (CodeType, type)):
            inner = (getattr(value, name, None) for name in ("__wrapped__", "__func__", "fget"))
            waiting.extend(function for function in inner if function is not None)
    return found


def _makes_leaves(network: Any) -> bool:
    names = ("make_inputs_require_grads", "make_inputs_require_grad")  # of transformers and PEFT
    hooks = (hook for module in network.modules() for hook in module._forward_hooks.values())
    return any(getattr(hook, "__name__", "") in names for hook in hooks)


def _forward_lines() -> list[tuple[CodeType, set[int]]]:
    """The lines that call the forward, in the functions of PyTorch that run a module's forward and its hooks."""
    call = nn.Module._call_impl.__code__
    found: dict[CodeType, set[int]] = {}
    for code in (call, *(inner for inner in call.co_consts if isinstance(inner, CodeType))):
        starts, line = dict(dis.findlinestarts(code)), 0
        for instruction in dis.get_instructions(code):
            line = starts.get(instruction.offset, line) or line
            if instruction.argval == "forward_call":
                found.setdefault(code, set()).add(line)
    return list(found.items())


_FORWARD_LINES = _forward_lines()


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, and in the tuples, lists and mappings among them."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, Mapping)):
        for child in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(child)


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
