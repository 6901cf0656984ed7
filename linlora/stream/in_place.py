"""Rules of in-place methods: the functional form, and the tensor takes its value (`linlora.stream.tensor.rebind`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linlora.stream.structural import tangent_or_zeros
from linlora.stream.tensor import DualTensor, Rule, TangentError, primals, rebind, rule, where, wrap

_OPERATORS = {
    "__iadd__": "__add__", "__isub__": "__sub__", "__imul__": "__mul__", "__itruediv__": "__truediv__",
    "__ipow__": "__pow__", "__idiv__": "__truediv__",
}  # fmt: skip


def _in_place(functional_form: Any) -> Rule:
    def apply(func: Any, args: tuple, kwargs: dict) -> Any:
        if not isinstance(args[0], DualTensor):
            return rebind(args[0], None, func)
        return rebind(args[0], functional_form(*args, **kwargs), func)

    return apply


for _name in dir(Tensor):
    if _name.endswith("_") and not _name.startswith("_") and callable(getattr(Tensor, _name[:-1], None)):
        rule(_name)(_in_place(getattr(Tensor, _name[:-1])))
for _name, _form in _OPERATORS.items():
    if hasattr(Tensor, _name):
        rule(_name)(_in_place(getattr(Tensor, _form)))


@rule("__setitem__")
def set_item(func: Any, args: tuple, kwargs: dict) -> None:
    x, index, value = args
    if not isinstance(x, DualTensor):
        rebind(x, None, func)
    primal, index = x.primal.clone(), primals(index)
    primal[index] = primals(value)
    with torch.no_grad():
        tangent = None if x.tangent is None else x.tangent.clone()
        if tangent is not None:
            tangent[index] = tangent_or_zeros(value, tangent.dtype) if isinstance(value, Tensor) else 0
    rebind(x, wrap(primal, tangent, x.stream), func)


@rule("requires_grad_", "retain_grad", "set_", "resize_", "copy_", "zero_", "fill_", "index_put_")
def refuse(func: Any, args: tuple, kwargs: dict) -> Any:
    raise TangentError(f"{where(func)}: changes a tensor that carries a tangent in a way the tangent cannot follow")
