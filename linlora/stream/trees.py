"""Trees of tensors as networks return and keep them: tuples, lists, dicts, dataclasses, caches and other objects."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from linlora.stream.tensor import DualTensor, rebuilt

Leaf = Callable[[Tensor, str], Tensor]
_LONG = 4096  # vocabularies and data sets that a module keeps are longer than its activations are many
_DEEP = 5
_SEQUENCES = (tuple, list, set, frozenset, deque)


def replaced(
    tree: Any, leaf: Leaf, opens: Callable[[Any], bool] | None = None, name: str = "", twins: dict | None = None
) -> Any:
    """A tree of the same types with leaf(tensor, its name) in the place of every tensor; what holds none is the same.

    Args:
        opens: the objects, beside tuples, lists, sets and dicts, whose attributes belong to the tree; None for all.
        name: of the tree: the field or key that holds it, or holds the tuple or list it is in.
        twins: the copies of dicts and objects so far, which may refer to one another; None where one is not needed yet.
    """
    opens, twins = opens or _is_object, {} if twins is None else twins
    if isinstance(tree, Tensor):
        return leaf(tree, name)
    if isinstance(tree, _SEQUENCES):
        children = [replaced(child, leaf, opens, name, twins) for child in tree]
        if all(new is old for new, old in zip(children, tree, strict=True)):
            return tree
        return type(tree)(children, tree.maxlen) if isinstance(tree, deque) else rebuilt(tree, children)
    if id(tree) in twins:  # whose children are being replaced, or have been
        if twins[id(tree)] is None:
            twins[id(tree)] = copy.copy(tree)
        return twins[id(tree)]
    if not (isinstance(tree, dict) or opens(tree)) or not _holds(tree, opens, set()):
        return tree
    twins[id(tree)] = None
    new = {key: replaced(child, leaf, opens, str(key), twins) for key, child in _items(tree).items()}
    changed = {key: new[key] for key, child in _items(tree).items() if new[key] is not child}
    twin = copy.copy(tree) if changed and twins[id(tree)] is None else twins[id(tree)]
    twins[id(tree)] = tree if twin is None else _set(twin, changed)
    return twins[id(tree)]


def _holds(tree: Any, opens: Callable[[Any], bool], seen: set[int]) -> bool:
    """Whether there is a tensor in a tree."""
    if isinstance(tree, Tensor) or id(tree) in seen:
        return isinstance(tree, Tensor)
    seen.add(id(tree))
    children: Any = tree if isinstance(tree, _SEQUENCES) else ()
    if isinstance(tree, dict) or (not children and opens(tree)):
        children = _items(tree).values()
    return any(_holds(child, opens, seen) for child in children)


def _items(tree: Any) -> dict[Any, Any]:
    """The items of a dict, the attributes of an object."""
    return dict(tree.items()) if isinstance(tree, dict) else {**_dict(tree), **_slots(tree)}


def _set(twin: Any, items: dict[Any, Any]) -> Any:
    """A dict or an object, with some of its items or attributes set."""
    for key, child in items.items():
        if isinstance(twin, dict):  # by item: transformers' ModelOutput, a dict, keeps attributes in step
            twin[key] = child
        elif key in _dict(twin):
            vars(twin)[key] = child
        else:
            object.__setattr__(twin, key, child)
    return twin


def release(tree: Any, seen: set[int], depth: int = 0) -> Any:
    """The same tree, changed in place where it can be, with the primals in the places of its DualTensors."""
    if isinstance(tree, DualTensor):
        return tree.primal
    if depth > _DEEP or id(tree) in seen:
        return tree
    if isinstance(tree, (dict, list)) and len(tree) <= _LONG:
        seen.add(id(tree))
        for key, child in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            new = release(child, seen, depth + 1)
            if new is not child:
                tree[key] = new
    elif isinstance(tree, tuple):
        children = [release(child, seen, depth + 1) for child in tree]
        if any(new is not old for new, old in zip(children, tree, strict=True)):
            return rebuilt(tree, children)
    elif _is_object(tree) and _dict(tree):
        seen.add(id(tree))
        release(vars(tree), seen, depth + 1)
    return tree


def _is_object(value: Any) -> bool:
    """Whether something may hold tensors in its attributes: an object of a class of Python, no module, no function."""
    kinds = (type, Tensor, nn.Module, FunctionType, MethodType, ModuleType)
    return not isinstance(value, kinds) and bool(_dict(value) or _slots(value))


def _dict(value: Any) -> dict[str, Any]:
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) else {}


def _slots(value: Any) -> dict[str, Any]:
    """The attributes that an object has in slots."""
    slots = ((kind, vars(kind).get("__slots__", ())) for kind in type(value).__mro__)
    names = [_attribute(kind, name) for kind, of in slots for name in ((of,) if isinstance(of, str) else of)]
    return {name: getattr(value, name) for name in names if name not in _OF_PYTHON and hasattr(value, name)}


def _attribute(kind: type, slot: str) -> str:
    """The name that a class gives to the attribute of a slot: a private one has that of the class in front."""
    private = slot.startswith("__") and not slot.endswith("__")
    return f"_{kind.__name__.lstrip('_')}{slot}" if private else slot


_OF_PYTHON = {"__dict__", "__weakref__"}
