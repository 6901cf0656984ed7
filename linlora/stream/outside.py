"""Tensors of the stream outside of the network: each is F = f + J δ, a plain tensor.

Outside, every function, conversion, copy and save acts on F, wherever the tensor was found: in an output of any type,
the result of a method, an attribute of a module, a list that a hook filled. Functions that only move elements keep both
streams, so that a key-value cache that was cropped, reordered or copied still goes back into the network.

Inside, `detach` ends a tensor's part in the network, which goes on with f, a constant. Whoever keeps it has F:
`Constant` holds both, and a function of constants is computed of both. So is, in a hook, whatever has no tangent.

A loss is a function of F, so it must not be linearized with the network. One that is made of functions that linlora
does not know as losses is recognized where it leaves: by its name, or as one number made of many values.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from linlora.stream import fused, structural
from linlora.stream.border import Place, place
from linlora.stream.caller import function_name, where
from linlora.stream.fallback import Randomness
from linlora.stream.tensor import (
    DualTensor,
    Stream,
    TangentError,
    collapse,
    differentiable,
    duals,
    named,
    primals,
    replace_duals,
)


class Constant(DualTensor):
    """A constant of the network, `primal`, with the `value` of F that it has outside.

    `value` is None where there is no such tensor: where F's indices, say, have another shape than those of f.
    """

    constant = True
    tangent = None  # type: ignore[assignment]
    has_graph = False

    @staticmethod
    def __new__(cls, primal: Tensor, value: Tensor | None, stream: Stream) -> Constant:
        dual = Tensor._make_wrapper_subclass(
            cls, primal.shape, strides=primal.stride(), dtype=primal.dtype, device=primal.device
        )
        dual.primal, dual.value, dual.stream, dual.relatives = primal, value, stream, []
        return dual

    @property
    def unknown(self) -> bool:  # type: ignore[override]
        return self.value is None

    def taken(self) -> Tensor:
        if self.value is None:
            raise TangentError(
                f"{where()}: takes {self.primal.dtype} values out of the network that are f(φ0)'s, where F has none "
                "of this shape; compute them from the model's outputs"
            )
        return self.value


def outside(func: Any, args: tuple, kwargs: dict) -> Any:
    """Any function of DualTensors, called by code that is no part of the network."""
    found, rule = list(duals((args, kwargs))), DualTensor.rules.get(func)
    if rule is structural.metadata and func not in _OF_THE_GRAPH and all(d.unknown or not d.constant for d in found):
        return rule(func, args, kwargs)
    if func in DualTensor.moves and rule is not None and not any(dual.constant for dual in found):
        result = rule(func, args, kwargs)
        if all(isinstance(x, DualTensor) or not isinstance(x, Tensor) for x in tree_flatten(result)[0]):
            for dual in duals(result):  # and not of a cast to integers, which has none
                dual.reduced = any(source.reduced for source in found)
            return result
    if func in DualTensor.moves and all(dual.constant for dual in found):
        return constants(func, args, kwargs)
    target = args[0] if args and _writes(func, kwargs) else None
    if isinstance(target, DualTensor):
        _settle(target, func)
    return func(*replace_duals(args, _f), **replace_duals(kwargs, _f))


def _f(dual: DualTensor) -> Tensor:
    """F, the same tensor each time: its gradients, hooks and memory are those of one tensor."""
    if dual.constant:
        return dual.taken()
    refuse_loss(dual)
    if dual.value is None:
        with torch.enable_grad():
            dual.value = dual.taken()
    return dual.value


def _settle(dual: DualTensor, func: Any) -> None:
    """Make a tensor that is written outside F from then on, in the network too."""
    others = [relative() for relative in dual.relatives]
    if any(other is not None and other is not dual for other in others):
        raise TangentError(
            f"{where(func)}: in-place, outside the network, on a view (or on a tensor that has views) of a tensor that "
            "carries a tangent; write x = x + y in place of x += y, or clone it first"
        )
    if not dual.constant:
        dual.primal = _f(dual)
        dual.__class__ = Constant


def refuse_loss(dual: DualTensor, name: str = "", network: str = "the network") -> None:
    """Raise TangentError where a tensor that leaves a network, as its output of this name, is a loss."""
    if dual.constant or not (dual.reduced or "loss" in name.lower()):
        return
    what = f"its {name!r}" if name else "a number, a sum or mean over what carries tangents,"
    raise TangentError(
        f"{network} returns {what} and computes its loss from functions that linlora does not know as losses, so it "
        "would be linearized with the network; leave the labels out and compute the loss from the outputs. (A result "
        "that is no loss keeps a dimension: sum or mean with keepdim=True; detach() what is only reported)"
    )


def constants(func: Any, args: tuple, kwargs: dict) -> Any:
    """A function whose result the network takes for a constant: of f for the network, of F for who takes it out."""
    found, rule = list(duals((args, kwargs))), DualTensor.rules.get(func)
    stream, target = found[0].stream, kwargs.get("out", args[0] if args and _writes(func, kwargs) else None)
    if rule is structural.metadata or not stream.bordered:
        return func(*primals(args), **primals(kwargs))
    if rule is structural.value:
        of_integers = all(dual.constant and not differentiable(dual.primal) for dual in found)
        if not of_integers or place(stream) is Place.HOOK:
            return rule(func, args, kwargs)
    if func is Tensor.__iter__:
        return iter(constants(torch.unbind, args, kwargs))
    if target is not None and not isinstance(target, DualTensor):
        if place(stream) is Place.HOOK:
            raise TangentError(
                f"{where(func)}: a hook writes into a plain tensor what is f(φ0)'s in the network, F's outside; write "
                "x = x + y in place of x += y, or keep the tensor and write after the forward"
            )
        return func(*primals(args), **primals(kwargs))
    flat, _ = tree_flatten((args, kwargs))
    random = Randomness(flat)
    plain = [leaf for leaf in flat if type(leaf) is Tensor and not leaf.is_inference()]
    written = [leaf._version for leaf in plain]
    y = func(*primals(args), **primals(kwargs))
    if target is None and not any(isinstance(leaf, Tensor) for leaf in tree_flatten(y)[0]):
        return y if place(stream) is Place.NETWORK else func(*collapse(args), **collapse(kwargs))
    again = written == [leaf._version for leaf in plain]  # else what it did would be done twice
    value = _of_f(func, args, kwargs, random) if again else _NONE
    if value is _NONE and isinstance(target, Constant):
        target.value = None
    return _paired(y, value, found, every=True)


def hooked(func: Any, args: tuple, kwargs: dict, result: Any) -> Any:
    """The result of a rule, where it is not one DualTensor. Integers and booleans are F's to who takes them out, and
    so is, in a hook, whatever else has no tangent."""
    rule = DualTensor.rules.get(func)
    if rule in (structural.metadata, structural.value, fused.loss) or _writes(func, kwargs):
        return result
    found, name = list(duals((args, kwargs))), function_name(func)
    if not found or not found[0].stream.bordered or name.endswith("_like") or name.startswith("new_"):
        return result
    leaves = [leaf for leaf in tree_flatten(result)[0] if not isinstance(leaf, DualTensor)]
    in_hook = bool(leaves) and place(found[0].stream) is Place.HOOK
    if not in_hook and not any(isinstance(leaf, Tensor) and not differentiable(leaf) for leaf in leaves):
        return result
    value = _of_f(func, args, kwargs, Randomness(tree_flatten((args, kwargs))[0]))
    if in_hook and not any(isinstance(leaf, Tensor) for leaf in leaves):
        return value
    return _paired(result, value, found, every=in_hook)


def mixed(func: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a function of constants and of tensors that carry tangents: for the network, or for a loss."""
    if DualTensor.rules.get(func) is fused.loss:
        return args, kwargs
    if _writes(func, kwargs) and isinstance(args[0], Constant):
        raise TangentError(
            f"{where(func)}: writes a value that carries a tangent into the result of detach(); clone it, or build the "
            "tensor with torch.cat, torch.stack or torch.where"
        )
    return replace_duals((args, kwargs), lambda dual: dual.primal if dual.constant else dual)


DualTensor.outside, DualTensor.constants = outside, constants
DualTensor.mixed, DualTensor.hooked = mixed, hooked


_NONE = object()


def _of_f(func: Any, args: tuple, kwargs: dict, random: Randomness | None) -> Any:
    """A function of F, with the random numbers that it drew of f; _NONE where it has no result."""
    if any(dual.unknown for dual in duals((args, kwargs))):
        return _NONE
    try:
        with torch.no_grad(), nullcontext() if random is None else random.repeated():
            args, kwargs = collapse((args, kwargs))
            if "norm" in function_name(func):  # which may update statistics
                args, kwargs = _own((args, kwargs))
            return func(*args, **kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError):  # where the indices of f do not fit those of F
        return _NONE


def _own(tree: Any) -> Any:
    leaves, structure = tree_flatten(tree)
    return tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in leaves], structure)


def _paired(y: Any, value: Any, found: list[DualTensor], every: bool) -> Any:
    """A result with constants in the places of its tensors without a tangent: `every` one, or integers only."""
    leaves, structure = tree_flatten(y)
    values, other = tree_flatten(value)
    if structure != other:
        values = [None] * len(leaves)
    same = {id(dual.primal): dual for dual in found if dual.constant}
    paired = []
    for leaf, of_f in zip(leaves, values, strict=True):
        if not isinstance(leaf, Tensor) or isinstance(leaf, DualTensor) or not (every or not differentiable(leaf)):
            paired.append(leaf)
        else:
            known = of_f if isinstance(of_f, Tensor) else None
            kept = same.get(id(leaf))
            paired.append(Constant(leaf, known, found[0].stream) if kept is None else kept)
    return tree_unflatten(paired, structure)


def _writes(func: Any, kwargs: dict) -> bool:
    name = function_name(func)
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITES or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


_WRITES = {
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip
_OF_THE_GRAPH = {*named("register_hook", "grad_fn", "is_leaf", "requires_grad")}
