"""Trees of tensors as networks return and keep them: tuples, lists, dicts, dataclasses, caches and other objects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from linlora.stream.tensor import DualTensor, rebuilt

Leaf = Callable[[Tensor], Tensor]
_LONG = 4096  # vocabularies and data sets that a module keeps are longer than its activations are many
_DEEP = 5


def replaced(tree: Any, leaf: Leaf, seen: dict[int, Any] | None = None) -> Any:
    """A tree of the same types with every tensor replaced; what holds none is the same object."""
    seen = {} if seen is None else seen
    if isinstance(tree, Tensor):
        return leaf(tree)
    if isinstance(tree, (tuple, list)):
        children = [replaced(child, leaf, seen) for child in tree]
        same = all(new is old for new, old in zip(children, tree, strict=True))
        return tree if same else rebuilt(tree, children)
    if not isinstance(tree, dict) and not _is_object(tree):
        return tree
    if id(tree) not in seen:
        seen[id(tree)] = tree  # to whatever refers back to it
        seen[id(tree)] = _twin(tree, leaf, seen)
    return seen[id(tree)]


def _twin(tree: Any, leaf: Leaf, seen: dict[int, Any]) -> Any:
    old = dict(tree.items()) if isinstance(tree, dict) else vars(tree)
    new = {key: replaced(child, leaf, seen) for key, child in old.items()}
    if all(new[key] is child for key, child in old.items()):
        return tree
    twin = copy.copy(tree)
    if isinstance(tree, dict):
        for key, child in new.items():  # by item: transformers' ModelOutput, a dict, keeps attributes in step
            twin[key] = child
    else:
        vars(twin).update(new)
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
    elif _is_object(tree):
        seen.add(id(tree))
        release(vars(tree), seen, depth + 1)
    return tree


def _is_object(value: Any) -> bool:
    """Whether something may hold tensors in its attributes: an object of a class of Python, no module, no function."""
    kinds = (type, Tensor, nn.Module, FunctionType, MethodType, ModuleType)
    return not isinstance(value, kinds) and isinstance(getattr(value, "__dict__", None), dict)
