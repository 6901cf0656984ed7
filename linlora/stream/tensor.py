"""`DualTensor`: a tensor that carries its tangent, and how a torch function called on one finds its rule."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from linlora.ops.transforms import transform_active
from linlora.stream import border, evaluation
from linlora.stream.caller import refuse_inside_function, remedy, where
from linlora.stream.errors import TangentError

Rule = Callable[[Any, tuple, dict], Any]


class Stream:
    """State that the tensors of one linearized model share.

    Attributes:
        fallbacks: the functions that ran without a rule (linlora.stream.fallback).
        output: what the model returns: "value", F = f + J δ; "both", DualTensors; "primal", f alone, with no tangent
            ever started. Users see "value", `linlora.functional.jvp` and `vjp` ask for the others.
        recorded: whether autograd was on where the stream began, at the first adapter of the latest forward pass. Then
            what the model does under torch.no_grad() is a constant, also where its forward is not called as a whole and
            linlora.stream.evaluation does not know.
        bordered: whether it is that of a network, outside of which its tensors are F (linlora.stream.outside).
    """

    rules: ClassVar[dict[Any, Rule]] = {}  # those of a kind of stream, which come before DualTensor's
    otherwise: ClassVar[str] = "use scope='layer'"  # what messages recommend at last
    guarded: ClassVar[bool] = False  # whether C++ code that returns a DualTensor as it is must raise

    def __init__(self) -> None:
        self.fallbacks: dict[tuple[str, str], Any] = {}
        self.output: Literal["value", "both", "primal"] = "value"
        self.recorded = True
        self.bordered = False

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(primal, tangent) of the input of an adapter; where that is plain, the stream begins."""
        if transform_active():
            raise TangentError(
                f"{where()}: torch.func (grad, jvp, vjp, vmap) and forward-mode AD do not run over a model at model "
                "scope, which forms its own tangents. Take gradients with loss.backward() or torch.autograd.grad, "
                "products with the Jacobian by linlora.functional.jvp and vjp, or use scope='layer'"
            )
        if isinstance(x, DualTensor) and x.stream.guarded:
            raise TangentError(
                f"{where()}: functional.dual of a network at model scope, whose tangents are those of its adapter; set "
                "scope='layer', or differentiate the function without linearize"
            )
        if isinstance(x, DualTensor) and not x.constant:
            return x.primal, x.tangent
        x = primals(x)
        self.recorded = evaluation.recording()
        if x.requires_grad and self.recorded and self.output == "value":
            x = border.without_input_gradient(x, self)
        return x if self.recorded else x.detach(), None

    def leave(self, y: Tensor, y_tangent: Tensor) -> Tensor:
        """The output of an adapter; a constant where the network calls it under its own torch.no_grad()."""
        if self.output == "primal":
            return y
        if self.bordered and evaluation.past_hooks():
            border.refuse_blocks(self)
        dual = DualTensor(y, y_tangent, self)
        return dual.detach() if evaluation.in_block() else dual

    def inside(self) -> bool:
        """Whether the network runs the code that calls this."""
        return border.inside(self)

    def outside(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A function of DualTensors that the network does not call."""
        return DualTensor.outside(func, args, kwargs)

    def blocked(self, func: Any, found: list[DualTensor]) -> bool:
        """Whether a result, under torch.no_grad(), is a constant: has no tangent."""
        if not evaluation.in_block() and not any(dual.has_graph and dual.stream.recorded for dual in found):
            return False
        refuse_inside_function(where(func))
        return True

    @contextmanager
    def returning(self, output: Literal["both", "primal"]) -> Iterator[None]:
        self.output = output
        try:
            yield
        finally:
            self.output = "value"


class DualTensor(Tensor):
    """A primal tensor with its tangent, of one shape and dtype; to Python code, a tensor of that shape and dtype.

    The primal is under autograd as any tensor is. The tangent is a constant to autograd: ∂L/∂δ needs the primal's
    graph alone (linlora.ops.dual).

    A tensor without a tangent is a plain tensor: a constant, and every integer and boolean. So indices (of topk, sort,
    argmax), masks and the branches taken on them are those of the primal; F is the linearization at φ0 of what runs
    there. A DualTensor has no storage of its own: code that bypasses `__torch_function__`, and would lose the tangent,
    raises.

    Outside the network it is F = f + J δ to every function (linlora.stream.outside).
    """

    primal: Tensor
    tangent: Tensor
    stream: Stream
    relatives: list[weakref.ref]  # the tensors that share its memory: views of one another
    value: Tensor | None = None  # F, once it was asked for outside the network
    reduced: bool = False  # one number made of many: at the network's output, a loss (linlora.stream.outside)
    constant: ClassVar[bool] = False  # whether it is a linlora.stream.outside.Constant
    unknown = False  # whether F has no such tensor

    rules: ClassVar[dict[Any, Rule]] = {}
    moves: ClassVar[set[Any]] = set()  # the functions that move elements and compute nothing
    outside: ClassVar[Callable[..., Any]]  # a function outside the network,
    constants: ClassVar[Callable[..., Any]]  # of constants alone,
    mixed: ClassVar[Callable[..., Any]]  # of constants and others,
    hooked: ClassVar[Callable[..., Any]]  # and in a hook (linlora.stream.outside)

    @staticmethod
    def __new__(cls, primal: Tensor, tangent: Tensor, stream: Stream) -> DualTensor:
        dual = Tensor._make_wrapper_subclass(
            cls,
            primal.shape,
            strides=primal.stride(),
            dtype=primal.dtype,
            device=primal.device,
            requires_grad=stream.guarded and primal.requires_grad,
        )
        dual.primal, dual.tangent, dual.stream, dual.relatives = primal, like(tangent, primal), stream, []
        return dual

    def __repr__(self) -> str:  # type: ignore[override]
        if not self.unknown and border.place(self.stream) is not border.Place.NETWORK:
            return repr(self.taken())
        return f"DualTensor(primal={self.primal!r}, tangent={self.tangent!r})"

    def __hash__(self) -> int:
        return id(self)

    @property
    def has_graph(self) -> bool:
        """Whether autograd records the primal."""
        return self.primal.requires_grad

    def taken(self) -> Tensor:
        """F, a plain tensor."""
        return self.primal + self.tangent

    @classmethod
    @torch.compiler.disable  # a compiled model runs eagerly where both streams flow
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_SHAPE and not args[0].constant:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = list(duals(args)) + list(duals(kwargs)) if kwargs else list(duals(args))
        stream = found[0].stream if found else _NO_STREAM
        if found and not stream.inside():
            return stream.outside(func, args, kwargs)
        if not torch.is_grad_enabled() and stream.blocked(func, found):
            return cls.constants(func, args, kwargs)
        if evaluation.past_hooks() and any(dual.stream.bordered and not dual.constant for dual in found):
            border.refuse_blocks(stream)
        if any(dual.constant for dual in found):
            if all(dual.constant for dual in found):
                return cls.constants(func, args, kwargs)
            args, kwargs = cls.mixed(func, args, kwargs)
        if kwargs.get("out") is not None:
            raise TangentError(f"{where(func)}: out= is not supported on a tensor that carries a tangent")
        args, kwargs = _by_position(func, args, kwargs)
        options = {name: value for name, value in kwargs.items() if name != "inplace"}
        try:
            result = (stream.rules.get(func) or cls.rules.get(func) or cls.rules[None])(func, args, options)
        except OtherCall:
            result = cls.rules[None](func, args, options)
        if kwargs.get("inplace"):
            result = rebind(args[0], result, func)
        if isinstance(result, DualTensor):
            result.reduced = _reduced(func, found, result)
            return result
        return cls.hooked(func, args, kwargs, result)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        stream = next((dual.stream for dual in duals((arguments, options))), _NO_STREAM)
        refuse_inside_function(where(func), stream.otherwise)
        raise TangentError(
            f"{where(func)}: called from code that bypasses torch functions (an extension, a compiled or scripted "
            f"function, torch.vmap), which would lose the tangent; replace it by torch functions, "
            f"{remedy(stream.otherwise)}"
        )


_NO_STREAM = Stream()


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for every torch function or Tensor method of these names."""

    def register(function: Rule) -> Rule:
        if not (found := named(*names)):
            raise ValueError(f"no torch function is called {names}")
        DualTensor.rules.update(dict.fromkeys(found, function))
        return function

    return register


def named(*names: str) -> list[Any]:
    """The functions of these names that a model can call, and the getters of properties."""
    found = []
    namespaces = (torch, Tensor, nn.functional, torch.special, torch.fft, torch._C._nn)
    for name, namespace in product(names, namespaces):
        if name.startswith("__") and namespace is not Tensor:  # those of a module are of the module
            continue
        target: Any = getattr(namespace, name, None)
        if callable(target) and not isinstance(target, type):
            found.append(target)
        elif namespace is Tensor and target is not None:
            found.append(target.__get__)  # a property
    return found


def _by_position(func: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """torch.add(x, other=y) as torch.add(x, y), x.max(axis=0) as x.max(dim=0): rules know one form of a call."""
    if not kwargs or "condition" in kwargs or _OTHER_FORMS.isdisjoint(kwargs):
        return args, kwargs
    numpy = _NAMES_OF_NUMPY if func in DualTensor.rules else {}  # without a rule, `axis` may be the function's own name
    kwargs = {numpy.get(name, name): value for name, value in kwargs.items()}
    for name in () if args else _NAMES_OF_FIRST & kwargs.keys():
        args = (kwargs.pop(name),)
    if len(args) == 1 and "other" in kwargs and "input" not in kwargs:
        args = (*args, kwargs.pop("other"))
    return args, kwargs


_NAMES_OF_FIRST = {"input", "tensors"}
_NAMES_OF_NUMPY = {"axis": "dim", "keepdims": "keepdim"}
_OTHER_FORMS = {*_NAMES_OF_FIRST, *_NAMES_OF_NUMPY, "other"}
_OF_SHAPE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex),
}
"""Questions that a DualTensor answers by itself, without a rule."""


class OtherCall(Exception):
    """A rule does not know the form of a call: the function runs without a rule (linlora.stream.fallback)."""


def bound(defaults: dict[str, Any], args: tuple, kwargs: dict, **named_only: Any) -> list[Any]:
    """The arguments of a call in the order of `defaults`, where `...` marks those without one, then those that are
    given by name alone.

    Raises OtherCall for an argument that is not among them, which another version of PyTorch may have.
    """
    known = {**defaults, **named_only}
    given = {**known, **dict(zip(defaults, args, strict=False)), **kwargs}
    values = list(given.values())
    if len(args) > len(defaults) or len(given) > len(known) or any(value is ... for value in values):
        raise OtherCall
    return values


ONE: dict[str, Any] = {"input": ...}
TWO: dict[str, Any] = {"input": ..., "other": ...}
"""The arguments of functions of one tensor and of two."""


def wrap(primal: Any, tangent: Any, stream: Stream) -> Any:
    """DualTensors of a primal and a tangent result, which are tensors or equal (named) tuples or lists of them.

    A result without a tangent, or of integers or booleans, is a constant: a plain tensor.
    """
    if isinstance(primal, Tensor):
        return DualTensor(primal, tangent, stream) if tangent is not None and differentiable(primal) else primal
    if not isinstance(primal, (tuple, list)):
        return primal
    tangents = tangent or [None] * len(primal)
    return rebuilt(primal, [wrap(p, t, stream) for p, t in zip(primal, tangents, strict=True)])


def like(tangent: Tensor, primal: Tensor) -> Tensor:
    """A tangent in the dtype and shape and on the device of its primal: as type promotion, autocast or broadcasting
    made that."""
    if tangent.dtype != primal.dtype or tangent.device != primal.device:
        tangent = tangent.to(primal.device, primal.dtype)
    return tangent if tangent.shape == primal.shape else tangent.expand(primal.shape)


def differentiable(x: Any) -> bool:
    """Whether something is a tensor of real or complex numbers, not of integers or booleans."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def duals(tree: Any) -> Iterator[DualTensor]:
    """The DualTensors among the arguments of a call."""
    if isinstance(tree, DualTensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for child in tree.values() if isinstance(tree, dict) else tree:
            if isinstance(child, DualTensor):
                yield child
            elif isinstance(child, (tuple, list, dict)):
                yield from duals(child)


def primals(tree: Any) -> Any:
    """The arguments of a call with every DualTensor replaced by its primal."""
    return tree.primal if isinstance(tree, DualTensor) else replace_duals(tree, lambda dual: dual.primal)


def collapse(tree: Any) -> Any:
    """The value of the linearized function, F = f + (J δ), in the place of every DualTensor of a tree.

    Its gradient is the primal's: J δ is a constant to autograd.
    """
    return replace_duals(tree, lambda dual: dual.taken())


def replace_duals(tree: Any, leaf: Callable[[DualTensor], Tensor]) -> Any:
    """A tree of tuples, lists and dicts with its DualTensors replaced; what holds none is the same object."""
    if isinstance(tree, DualTensor):
        return leaf(tree)
    if not isinstance(tree, (tuple, list, dict)) or next(duals(tree), None) is None:
        return tree
    if isinstance(tree, dict):  # and transformers' ModelOutput, which is one
        replaced = copy.copy(tree)
        for name, child in tree.items():
            replaced[name] = replace_duals(child, leaf)
        return replaced
    return rebuilt(tree, [replace_duals(child, leaf) for child in tree])


def rebuilt(tree: Any, children: list) -> Any:
    """A tuple or list of the type of `tree`: namedtuples take fields one by one, torch.return_types a sequence."""
    return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)


def _reduced(func: Any, found: list[DualTensor], result: DualTensor) -> bool:
    """Whether a result is one number made of many: a sum or mean, say, or what is computed of such numbers alone."""
    with torch._C.DisableTorchFunctionSubclass():
        if result.dim() or func in DualTensor.moves:
            return all(dual.reduced for dual in found)
        return any(dual.reduced or dual.dim() for dual in found)


_alias = torch._C._is_alias_of  # type: ignore[attr-defined]


def relate(x: DualTensor, results: Any) -> Any:
    """The results of a function of x, after noting which of them are views of it: those that share its memory."""
    for view in [results] if isinstance(results, Tensor) else results:
        if view is not x and isinstance(view, Tensor) and _alias(x.primal, primals(view)):
            if not x.relatives:
                x.relatives = [weakref.ref(x)]
            x.relatives.append(weakref.ref(view))
            if isinstance(view, DualTensor):
                view.relatives = x.relatives
    return results


def rebind(target: DualTensor, result: Any, func: Any) -> DualTensor:
    """x.op_(y): the target takes the value of the functional form, and so do the tensors that share its memory."""
    living = [relative() for relative in target.relatives]
    others = [other for other in living if other is not None and other is not target and other is not result]
    if result.shape != target.shape:
        raise TangentError(
            f"{where(func)}: in-place result {tuple(result.shape)} in {tuple(target.shape)}; write x = x.op(...) in "
            "place of x.op_(...)"
        )
    primal = primals(result).to(target.primal.dtype)  # primal first: that of a pending activation is its argument's
    tangent = result.tangent if isinstance(result, DualTensor) else torch.zeros_like(primal)  # constant: x.round_()
    if others:
        _write_through(target, others, primal, like(tangent, primal), func)
    else:
        target.primal, target.tangent = primal, like(tangent, primal)
    return target


def _write_through(target: DualTensor, others: list[Any], primal: Tensor, tangent: Tensor, func: Any) -> None:
    """A write into memory that several tensors see: all become views of a copy of it, which autograd follows."""
    members = [*others, target]
    if any(type(other) is not DualTensor or _overlaps_itself(other.primal) for other in members):
        raise TangentError(
            f"{where(func)}: in-place on a tensor whose memory is also that of a constant, an activation or an "
            f"expanded tensor, which would not follow; write x = x + y in place of x += y, or {target.stream.otherwise}"
        )
    start = min(member.primal.storage_offset() for member in members)
    places = [(m.primal.size(), m.primal.stride(), m.primal.storage_offset() - start) for m in members]
    size = max(offset + 1 + sum((n - 1) * s for n, s in zip(*shape, strict=True)) for *shape, offset in places)
    memory, of_tangents = (target.primal.new_zeros(size) for _ in range(2))
    for member, place in zip(members, places, strict=True):
        memory.as_strided(*place).copy_(member.primal)
        of_tangents.as_strided(*place).copy_(member.tangent)
    memory.as_strided(*places[-1]).copy_(primal)
    of_tangents.as_strided(*places[-1]).copy_(tangent)
    for member, place in zip(members, places, strict=True):
        member.primal, member.tangent = memory.as_strided(*place), of_tangents.as_strided(*place)


def _overlaps_itself(x: Tensor) -> bool:
    reach = 1
    for stride, length in sorted((s, n) for s, n in zip(x.stride(), x.size(), strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (length - 1) + reach
    return x.numel() == 0
