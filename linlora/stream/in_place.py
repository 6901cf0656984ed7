"""Rules of in-place methods: the functional form, and the tensor takes its value (`linlora.stream.tensor.rebind`)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linlora.stream.caller import remedy, running_modules, where
from linlora.stream.structural import tangent_or_zeros
from linlora.stream.tensor import (
    DualTensor,
    Rule,
    Stream,
    TangentError,
    differentiable,
    duals,
    primals,
    rebind,
    relate,
    rule,
    wrap,
)


def _in_place(functional_form: Any) -> Rule:
    def apply(func: Any, args: tuple, kwargs: dict) -> Any:
        if isinstance(args[0], Tensor) and not differentiable(args[0]):
            return func(args[0], *primals(args[1:]), **primals(kwargs))
        target = followed(args[0], func, (args, kwargs))
        return rebind(target, functional_form(target, *args[1:], **kwargs), func)

    return apply


for _namespace, _name in ((namespace, name) for namespace in (torch, Tensor) for name in dir(namespace)):
    _form = getattr(_namespace, _name[:-1], None)
    if _name.endswith("_") and not _name.startswith("_") and callable(_form):
        rule(_name)(_in_place(_form))
for _form, *_names in (
    (Tensor.__add__, "__iadd__"), (Tensor.__sub__, "__isub__"), (Tensor.__mul__, "__imul__"),
    (Tensor.__truediv__, "__itruediv__", "__idiv__"), (Tensor.__pow__, "__ipow__"),
):  # fmt: skip
    rule(*_names)(_in_place(_form))


@rule("copy_", "fill_")
def copy(func: Any, args: tuple, kwargs: dict) -> Any:
    """x takes the values of another tensor, in its own dtype and shape."""

    def copied(x: DualTensor, *source: Any, **options: Any) -> Any:
        primal = func(torch.empty_like(x.primal), *primals(source), **primals(options))
        dual = next(duals((source, options)), None)
        return wrap(primal, None if dual is None else dual.tangent, x.stream)

    return _in_place(copied)(func, args, kwargs)


@rule("__setitem__")
def set_item(func: Any, args: tuple, kwargs: dict) -> None:
    def written(x: DualTensor, index: Any, value: Any) -> Any:
        primal = x.primal.clone()
        primal[index] = primals(value)
        with torch.no_grad():
            tangent = x.tangent.clone()
            tangent[index] = tangent_or_zeros(value, tangent.dtype) if isinstance(value, Tensor) else 0
        return wrap(primal, tangent, x.stream)

    _in_place(written)(func, args, kwargs)


@rule("zero_", "normal_", "uniform_", "exponential_", "cauchy_", "geometric_", "log_normal_", "random_")
def fill(func: Any, args: tuple, kwargs: dict) -> Any:
    """Values that do not depend on those before: a constant."""
    return rebind(args[0], func(torch.empty_like(args[0].primal), *args[1:], **kwargs), func)


def followed(target: Tensor, func: Any, arguments: Any) -> DualTensor:
    """The target of a write. A plain tensor becomes a DualTensor of tangent zero, and stays the same object to all who
    hold it, where no other tensor and no module keeps its memory: experts of a mixture add what they give to zeros.
    So does, with it, the tensor that it is a view of: latent attention copies its parts into slices of its keys."""
    if isinstance(target, DualTensor):
        return target
    base, stream = target._base, next(duals(arguments)).stream
    if not _owns_memory(target, base) or any(
        kept is target or (base is not None and kept is base) for module in running_modules() for kept in _kept(module)
    ):
        raise TangentError(
            f"{where(func)}: writes a value that carries a tangent into a tensor that has none and shares its memory "
            "with others, or is kept by a module (in inference mode, also into a slice: use torch.no_grad); build the "
            f"tensor with torch.cat, torch.stack or torch.where, {remedy(stream.otherwise)}"
        )
    if base is None:
        return _become_dual(target, target.detach(), stream)
    place = target.size(), target.stride(), target.storage_offset()
    view = _become_dual(target, target.detach(), stream)
    view.primal = None  # type: ignore[assignment]  # which is a view of the base as that was, and keeps it from changing
    base = _become_dual(base, base.detach(), stream)
    view.primal, view.tangent = base.primal.as_strided(*place), base.tangent.as_strided(*place)
    relate(base, view)
    return view


def _become_dual(x: Tensor, like: Tensor, stream: Stream) -> DualTensor:
    dual = DualTensor(like, torch.zeros_like(like), stream)
    torch.utils.swap_tensors(x, dual)
    x.primal = dual  # type: ignore[attr-defined]
    return x  # type: ignore[return-value]


def _owns_memory(x: Tensor, base: Tensor | None) -> bool:
    """Whether no other tensor or array sees the memory of a plain tensor, or of it and the one that it is a view of."""
    holders = [x] if base is None else [x, base]
    if any(type(holder) is not Tensor or weakref.getweakrefs(holder) for holder in holders):
        return False
    if x._use_count() > 1 or (base is not None and base._use_count() > 2):  # type: ignore[attr-defined]
        return False
    storage = x.untyped_storage()
    # those of the holders and of this variable
    return storage.resizable() and torch._C._storage_Use_Count(storage._cdata) == len(holders) + 1


def _kept(module: Any) -> Iterator[Any]:
    yield from module._buffers.values()
    yield from vars(module).values()


@rule("requires_grad_", "retain_grad", "set_", "resize_", "resize_as_")
def refuse(func: Any, args: tuple, kwargs: dict) -> Any:
    raise TangentError(f"{where(func)}: changes a tensor that carries a tangent in a way the tangent cannot follow")
