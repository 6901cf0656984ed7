"""`dual`: the output of a network and its tangent in the inputs, in one pass that ordinary backward follows."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from linlora.ops.transforms import transform_active
from linlora.stream.border import tensors
from linlora.stream.errors import TangentError
from linlora.stream.forward import ForwardStream
from linlora.stream.tensor import DualTensor, differentiable
from linlora.stream.trees import release, replaced


@torch.compiler.disable(reason="linlora.functional.dual runs eagerly: both streams flow through the network's Python")
def dual(model: Callable[..., Any], inputs: Any, tangents: Any) -> tuple[Any, Any]:
    """The output of a network, and its tangent: the derivative of the output along tangents of the inputs.

    What `torch.func.jvp(model, inputs, tangents)` returns, with attention in O(S) memory, and with a graph of the
    output alone: the network's own, that of `model(*inputs)`. So `backward` costs what it does without tangents, and
    the forward keeps no more for it.

    Args:
        model: a module, or any function that calls modules; it runs once, unmodified.
        inputs: a tuple of the arguments of `model`, or a mapping of its keyword arguments; each a tensor, a tree of
            them (tuples, lists, dicts) or anything else.
        tangents: of the same structure; a tensor like its input, in shape, dtype and device, or None where there is
            none: in place of one tensor, or of a whole argument.

    Returns: (output, tangent), both as `model` returns them: a tensor, or tuples, lists, dicts, dataclasses and other
    objects that hold tensors. The tangent of what does not depend on the inputs, and of integers and booleans, is zero;
    what is no tensor is the same in both.

    The tangent is a constant to autograd: MeanFlow, sCM and rCM stop its gradient anyway. Backward through it raises
    TangentError, not a smaller gradient: `detach()` it. For gradients of the tangent use torch.func.jvp.

    Differences from torch.func.jvp: dropout of attention has one mask for both streams and its own random numbers;
    torch.compile, in the network or around it, runs eagerly here; what the network writes in place into an input with a
    tangent stays inside: your tensor, and whatever else shares its memory, keep their values.

    Raises ValueError where a tangent does not fit its input, TypeError for other inputs, TangentError, which names
    module, function and remedy, where a tangent cannot be formed.

    MeanFlow (Geng et al., 2025), one training step:

    >>> import torch
    >>> from linlora.functional import dual
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2))
    >>> def u(z, r, t):
    ...     return net(torch.cat([z, r, t], dim=1))
    >>> z, v, r, t = torch.randn(8, 2), torch.randn(8, 2), torch.zeros(8, 1), torch.rand(8, 1)
    >>> out, out_tangent = dual(u, (z, r, t), (v, None, torch.ones_like(t)))
    >>> target = (v - (t - r) * out_tangent).detach()
    >>> (out - target).square().mean().backward()
    """
    if transform_active():
        raise TangentError(
            "dual: torch.func (jvp, vjp, grad, vmap) and forward-mode AD cannot surround it, because its tangent is a "
            "constant; nest the transforms of torch.func alone"
        )
    if not isinstance(inputs, (tuple, list, Mapping)):
        raise TypeError(f"dual: inputs is a tuple of arguments or a mapping of keyword arguments, got {_kind(inputs)}")
    stream = ForwardStream()
    held: list[Tensor] = []
    arguments = _started(inputs, tangents, "inputs", stream, held)
    modules = list(dict.fromkeys(modules_of(model)))
    with ExitStack() as stack:
        stack.enter_context(_eagerly(modules))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from linlora.stream.sharded import through_wrappers  # which imports FSDP2

            stack.enter_context(through_wrappers(modules))
        stack.callback(_release, modules)
        stack.callback(setattr, stream, "running", False)
        stream.running = True
        output = model(**arguments) if isinstance(arguments, Mapping) else model(*arguments)
        tangent = replaced(output, _tangent)
        output = replaced(output, _primal)
    del held
    return output, tangent


def _started(x: Any, tangent: Any, name: str, stream: ForwardStream, held: list[Tensor]) -> Any:
    """An argument with a DualTensor in the place of each tensor that has a tangent.

    `held` gets aliases of the others: a network that writes tangents into memory of its caller is refused.
    """
    if isinstance(x, DualTensor):
        raise TangentError(f"dual: {name} carries a tangent already; nest the transforms of torch.func instead")
    if isinstance(x, Tensor):
        if tangent is None:
            held.append(x.detach())
            return x
        _check(x, tangent, name)
        return DualTensor(x, tangent.detach(), stream)
    children = _children(x)
    if children is None or (tangent is None and name != "inputs"):
        if tangent is not None:
            raise ValueError(f"dual: {name} is {_kind(x)}, which takes no tangent; give None")
        held.extend(leaf.detach() for leaf in tensors(x))
        return x
    others = _children(tangent)
    if others is None or isinstance(x, Mapping) != isinstance(tangent, Mapping) or children.keys() != others.keys():
        raise ValueError(
            f"dual: tangents are expected to have the structure of {name}, {_shape(x)}, got {_shape(tangent)}; "
            "None stands for no tangent"
        )
    parts = [_started(child, others[key], f"{name}[{key!r}]", stream, held) for key, child in children.items()]
    if isinstance(x, Mapping):
        return dict(zip(children, parts, strict=True))
    return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)


def _children(x: Any) -> dict[Any, Any] | None:
    if isinstance(x, Mapping):
        return dict(x)
    return dict(enumerate(x)) if isinstance(x, (tuple, list)) else None


def _check(x: Tensor, tangent: Any, name: str) -> None:
    of = "tangents" + name.removeprefix("inputs")
    if not isinstance(tangent, Tensor):
        raise ValueError(f"dual: {of} is {_kind(tangent)}, {name} a tensor; give a tensor like it, or None")
    if not differentiable(x):
        raise ValueError(f"dual: {name} is {x.dtype}, which has no tangent; give None")
    for what, expected, actual in (
        ("shape", tuple(x.shape), tuple(tangent.shape)),
        ("dtype", x.dtype, tangent.dtype),
        ("device", x.device, tangent.device),
        ("layout", torch.strided, x.layout),
        ("layout", torch.strided, tangent.layout),
    ):
        if expected != actual:
            raise ValueError(f"dual: {of} is expected to have the {what} of {name}, {expected}, got {actual}")
    if tangent.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"dual: {of} asks for a gradient, but a tangent is a constant to autograd; detach() it, or use "
            "torch.func.jvp for gradients of tangents"
        )


def _kind(x: Any) -> str:
    return "None" if x is None else f"a {type(x).__name__}"


def _shape(x: Any) -> str:
    children = _children(x)
    if children is None:
        return _kind(x)
    return f"{type(x).__name__} of {sorted(map(str, children)) if isinstance(x, Mapping) else len(children)}"


def _primal(x: Tensor, _: str) -> Tensor:
    return x.primal if isinstance(x, DualTensor) else x


def _tangent(x: Tensor, _: str) -> Tensor:
    if not isinstance(x, DualTensor):
        return torch.zeros_like(x, requires_grad=False)
    tangent = x.tangent.contiguous() if 0 in x.tangent.stride() else x.tangent  # written by nobody else
    return _ConstantTangent.apply(tangent, x.primal) if x.primal.requires_grad and torch.is_grad_enabled() else tangent


class _ConstantTangent(torch.autograd.Function):
    """A tangent to autograd: it depends on what its primal depends on, and cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, tangent: Tensor, primal: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        raise TangentError(
            "dual: backward reached the tangent, which is a constant to autograd, so the gradient would lack a term; "
            "detach() it (MeanFlow, sCM and rCM do), or use torch.func.jvp for gradients of the tangent"
        )


def modules_of(function: Any) -> Iterator[nn.Module]:
    """The modules that a callable is seen to reach: itself, those of a partial, a method, a closure, and globals."""
    waiting, seen = [function], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            yield from value.modules()
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            waiting += [value.__self__, value.__func__]
        elif isinstance(value, FunctionType):
            waiting += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            waiting += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            named = (value.__globals__.get(name) for name in _names(value.__code__))
            waiting += [found for found in named if isinstance(found, (nn.Module, functools.partial))]
        elif isinstance(value, (tuple, list, dict)):
            waiting += [x for x in (value.values() if isinstance(value, dict) else value) if isinstance(x, nn.Module)]
        elif value is function and hasattr(value, "__dict__"):  # an object that is called
            waiting += list(vars(value).values())


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _eagerly(modules: list[nn.Module]) -> Any:
    """What was compiled runs as it was written, both streams through its Python."""
    for module in modules:
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            warnings.warn(
                f"dual: {type(getattr(module, '_orig_mod', module)).__name__} is compiled, but runs eagerly here, "
                "because both streams flow through its Python",
                stacklevel=4,
            )
            break
    return torch.compiler.set_stance("force_eager")


def _release(modules: list[nn.Module]) -> None:
    """Leave plain tensors where a module kept tensors of the stream."""
    seen: set[int] = set()
    for module in modules:
        for name, value in list(vars(module).items()):
            if name in _OF_MODULES or type(value) in _PLAIN:
                continue
            new = release(value, seen)
            if new is not value:
                vars(module)[name] = new


_PLAIN = {type(None), bool, int, float, str}
_OF_MODULES = {"_parameters", "_modules"} | {name for name in vars(nn.Module()) if "hook" in name}
