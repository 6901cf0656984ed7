"""Rules of functions that move elements or read no values: the same map on primal and tangent, or on neither."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from linlora.stream.border import Place, place
from linlora.stream.caller import where
from linlora.stream.fallback import forward_mode
from linlora.stream.tensor import (
    ONE,
    DualTensor,
    TangentError,
    bound,
    collapse,
    differentiable,
    duals,
    named,
    primals,
    relate,
    rule,
    wrap,
)

_MOVES = (
    "view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "permute", "movedim", "squeeze", "unsqueeze",
    "expand", "expand_as", "view_as", "reshape_as", "narrow", "select", "chunk", "split", "split_with_sizes",
    "tensor_split", "unbind", "__getitem__", "diagonal", "t", "T", "mT", "contiguous", "to", "type_as",
    "float", "double", "half", "bfloat16", "cpu", "cuda", "unfold", "view_as_complex", "view_as_real",
    "roll", "flip", "repeat", "repeat_interleave", "tile", "gather", "index_select", "take_along_dim", "clone",
)  # fmt: skip
_SUMS = (
    "neg", "__neg__", "negative", "positive", "sum", "mean", "cumsum", "tril", "triu", "real", "imag", "conj",
    "adjoint", "resolve_conj", "resolve_neg", "H", "mH",
)  # fmt: skip
_METADATA = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_quantized", "is_nested", "is_mps", "names", "itemsize", "nbytes", "size", "dim", "ndimension",
    "numel", "nelement", "stride", "storage_offset", "element_size", "is_floating_point", "is_complex", "is_signed",
    "is_contiguous", "get_device", "__len__", "is_inference", "is_same_size", "result_type", "register_hook",
)  # fmt: skip
_CONSTANTS = (
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "bernoulli",
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "sign", "floor", "ceil", "round",
    "eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "isnan", "isinf",
    "isfinite", "argmax", "argmin", "argsort", "logical_not", "logical_and", "logical_or", "__and__", "__or__",
    "__invert__", "any", "all", "nonzero", "isclose",
    "equal", "allclose", "is_nonzero", "__contains__", "__bool__",
)  # fmt: skip
_VALUES = (
    "__int__", "__float__", "__complex__", "__index__", "item", "tolist", "numpy", "__array__", "__format__",
    "storage", "untyped_storage", "data_ptr", "backward", "__reduce_ex__", "__dlpack__",
)  # fmt: skip


_JOINS = ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
DualTensor.moves = {*named(*_MOVES, *_JOINS, "__deepcopy__", "__iter__")}


@rule(*_MOVES, *_SUMS)
def linear_map(func: Any, args: tuple, kwargs: dict) -> Any:
    """func(x, …) with x the only argument that is differentiated: func of the primal, func of the tangent."""
    x, rest, options = args[0], primals(args[1:]), primals(kwargs)
    y = func(primals(x), *rest, **options)
    if not isinstance(x, DualTensor):
        return y
    if y is x.primal:
        return x
    with torch.no_grad():
        # strides of its own, after broadcasting say, would not allow what those of the primal do
        tangent = x.tangent.contiguous() if func in _OF_STRIDES else x.tangent
        return relate(x, wrap(y, func(tangent, *rest, **options), x.stream))


_OF_STRIDES = {*named("view", "view_as", "unflatten", "view_as_complex")}


@rule("view")
def view(func: Any, args: tuple, kwargs: dict) -> Any:
    """x.view(shape) is a linear map; x.view(dtype) reads the bits of the primal as other numbers, a constant."""
    dtype = kwargs.get("dtype", args[-1] if len(args) == 2 else None)
    return constant(func, args, kwargs) if isinstance(dtype, torch.dtype) else linear_map(func, args, kwargs)


_ALONG: dict[str, Any] = {**ONE, "dim": -1, "keepdim": False}
_SELECTIONS: dict[str, dict[str, Any]] = {
    "sort": {**ONE, "dim": -1, "descending": False, "stable": False},
    "topk": {**ONE, "k": ..., "dim": -1, "largest": True, "sorted": True},
    "kthvalue": {**ONE, "k": ..., "dim": -1, "keepdim": False},
    "cummax": {**ONE, "dim": ...}, "cummin": {**ONE, "dim": ...},
    "mode": _ALONG, "max": _ALONG, "min": _ALONG, "median": _ALONG, "nanmedian": _ALONG,
}  # fmt: skip


@rule(*_SELECTIONS)
def selection(func: Any, args: tuple, kwargs: dict) -> Any:
    """(values, indices) along a dimension: the tangents of the values are those at the indices of the primal."""
    arguments = _SELECTIONS[func.__name__]
    x, dim = (dict(zip(arguments, bound(arguments, args, kwargs), strict=True))[name] for name in ("input", "dim"))
    y = func(primals(x), *primals(args[1:]), **primals(kwargs))
    if isinstance(y, Tensor) or not isinstance(x, DualTensor):  # of all elements, or of two tensors
        return forward_mode(func, args, kwargs)
    with torch.no_grad():
        if y[1].dim() < x.dim():
            return wrap(y, [x.tangent.gather(dim, y[1].unsqueeze(dim)).squeeze(dim), None], x.stream)
        return wrap(y, [x.tangent.gather(dim, y[1]), None], x.stream)


@rule("type")
def type_of(func: Any, args: tuple, kwargs: dict) -> Any:
    """x.type(dtype) is a cast; x.type() a name."""
    return linear_map(func, args, kwargs) if len(args) + len(kwargs) > 1 else metadata(func, args, kwargs)


@rule("__deepcopy__")
def deep_copy(func: Any, args: tuple, kwargs: dict) -> Any:
    """Both streams, of the key-value cache of a prompt that several continuations start from."""
    x, memo = args
    if id(x) not in memo:
        memo[id(x)] = DualTensor(copy.deepcopy(x.primal, memo), copy.deepcopy(x.tangent, memo), x.stream)
    return memo[id(x)]


@rule("__iter__")
def iterate(func: Any, args: tuple, kwargs: dict) -> Any:
    return iter(linear_map(torch.unbind, args, {}))


@rule(*_METADATA)
def metadata(func: Any, args: tuple, kwargs: dict) -> Any:
    return func(*primals(args), **primals(kwargs))


@rule(*_CONSTANTS)
def constant(func: Any, args: tuple, kwargs: dict) -> Any:
    """A result that does not depend on the values of its argument, or not differentiably."""
    return func(*primals(args), **primals(kwargs))


@rule("detach", "data")
def detached(func: Any, args: tuple, kwargs: dict) -> Any:
    return DualTensor.constants(func, args, kwargs)


@rule(*_VALUES)
def value(func: Any, args: tuple, kwargs: dict) -> Any:
    """Python and NumPy get F in a hook. The network itself would compute with it as with a constant."""
    stream = next(duals((args, kwargs))).stream
    if place(stream) is Place.HOOK:
        return func(*collapse(args), **collapse(kwargs))
    raise TangentError(
        f"{where(func)}: takes the values of a tensor that carries a tangent out of the stream (a branch on values, a "
        "conversion to Python or NumPy); a tangent cannot follow. Use torch.where for the branch, or "
        f"{stream.otherwise}"
    )


@rule(*_JOINS, "slice_scatter", "select_scatter", "diagonal_scatter")
def joint_map(func: Any, args: tuple, kwargs: dict) -> Any:
    """func is linear in all its tensors together: those without a tangent, integers too, have tangent zero."""
    return _joint(func, args, kwargs, lambda x: isinstance(x, Tensor))


@rule("index_add", "index_copy", "index_put", "scatter_add", "masked_scatter")
def indexed_map(func: Any, args: tuple, kwargs: dict) -> Any:
    """func is linear in all its tensors of numbers together; integers and booleans say where."""
    return _joint(func, args, kwargs, differentiable)


def _joint(func: Any, args: tuple, kwargs: dict, is_joined: Callable[[Any], bool]) -> Any:
    y = func(*primals(args), **primals(kwargs))
    with torch.no_grad():
        given, structure = tree_flatten((args, kwargs))
        tangents = [tangent_or_zeros(x, y.dtype) if is_joined(x) else x for x in given]
        rest, options = tree_unflatten(tangents, structure)
        return wrap(y, func(*rest, **options), next(duals(given)).stream)


@rule("where")
def choose(func: Any, args: tuple, kwargs: dict) -> Any:
    """where(condition, a, b); as a method, condition.where is a.where(condition, b)."""
    if len(args) + len(kwargs) == 1:
        return constant(func, args, kwargs)
    kwargs = {"input" if name == "self" else name: value for name, value in kwargs.items()}
    if func == Tensor.where:
        a, condition, b = bound(dict.fromkeys(("input", "condition", "other"), ...), args, kwargs)
    else:
        condition, a, b = bound(dict.fromkeys(("condition", "input", "other"), ...), args, kwargs)
    y = torch.where(primals(condition), primals(a), primals(b))
    tangents = [t.tangent if isinstance(t, DualTensor) else None for t in (a, b)]
    stream = next(duals((condition, a, b))).stream
    if all(t is None for t in tangents):
        return y
    with torch.no_grad():
        a_tangent, b_tangent = (y.new_zeros(()) if t is None else t.to(y.dtype) for t in tangents)
        return wrap(y, torch.where(primals(condition), a_tangent, b_tangent), stream)


@rule("masked_fill")
def masked_fill(func: Any, args: tuple, kwargs: dict) -> Any:
    x, mask, value = bound(dict.fromkeys(("input", "mask", "value"), ...), args, kwargs)
    if not isinstance(x, DualTensor) or isinstance(value, DualTensor):
        return choose(torch.where, (mask, value, x), {})
    y = x.primal.masked_fill(primals(mask), value)
    with torch.no_grad():
        y_tangent = x.tangent.masked_fill(primals(mask), 0)
    return wrap(y, y_tangent, x.stream)


def tangent_or_zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(x, DualTensor):
        return x.tangent.to(dtype)
    return torch.zeros_like(primals(x), dtype=dtype)
