"""Rules of functions that move elements or read no values: the same map on primal and tangent, or on neither."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from linlora.stream.border import Place, place
from linlora.stream.tensor import DualTensor, TangentError, collapse, duals, named, primals, relate, rule, where, wrap

_VIEWS = (
    "view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "permute", "movedim", "squeeze", "unsqueeze",
    "expand", "expand_as", "view_as", "reshape_as", "narrow", "select", "chunk", "split", "split_with_sizes",
    "tensor_split", "unbind", "__getitem__", "diagonal", "t", "T", "mT", "contiguous", "to", "type_as",
    "float", "double", "half", "bfloat16", "cpu", "cuda", "unfold", "view_as_complex", "view_as_real",
)  # fmt: skip
_LINEAR_MAPS = (
    "neg", "__neg__", "negative", "positive", "sum", "mean", "cumsum", "roll", "flip", "repeat", "repeat_interleave",
    "tile", "gather", "index_select", "take_along_dim", "clone", "tril", "triu",
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
)  # fmt: skip
_COMPARISONS = (
    "eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "isnan", "isinf",
    "isfinite", "argmax", "argmin", "argsort", "logical_not", "logical_and", "logical_or", "__and__", "__or__",
    "__invert__", "any", "all", "nonzero", "isclose",
)  # fmt: skip
_VALUES = (
    "__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy", "__array__", "equal",
    "allclose", "is_nonzero", "untyped_storage", "data_ptr", "backward", "__reduce_ex__", "__dlpack__",
    "__format__", "__complex__",
)  # fmt: skip


_COPIES = (
    "roll", "flip", "repeat", "repeat_interleave", "tile", "gather", "index_select", "take_along_dim", "clone", "cat",
    "concat", "concatenate", "stack", "hstack", "vstack", "__deepcopy__", "__iter__",
)  # fmt: skip
DualTensor.moves = {function for name in (*_VIEWS, *_COPIES) for function in named(name)}


@rule(*_LINEAR_MAPS)
def linear_map(func: Any, args: tuple, kwargs: dict) -> Any:
    """func(x, …) with x the only argument that is differentiated: func of the primal, func of the tangent."""
    return _map(func, args, kwargs, view=False)


@rule(*_VIEWS)
def view(func: Any, args: tuple, kwargs: dict) -> Any:
    """A linear map whose result may share memory with its argument."""
    return _map(func, args, kwargs, view=True)


def _map(func: Any, args: tuple, kwargs: dict, view: bool) -> Any:
    x, rest = args[0], primals(args[1:])
    y = func(primals(x), *rest, **primals(kwargs))
    if not isinstance(x, DualTensor):
        return y
    if y is x.primal:
        return x
    if x.tangent is None:
        y_tangent = None
    else:
        with torch.no_grad():
            y_tangent = func(x.tangent, *rest, **primals(kwargs))
    result = wrap(y, y_tangent, x.stream)
    return relate(x, result) if view else result


@rule("type")
def type_of(func: Any, args: tuple, kwargs: dict) -> Any:
    """x.type(dtype) is a view; x.type() a name."""
    return view(func, args, kwargs) if len(args) + len(kwargs) > 1 else metadata(func, args, kwargs)


@rule("__deepcopy__")
def deep_copy(func: Any, args: tuple, kwargs: dict) -> Any:
    """Both streams, of the key-value cache of a prompt that several continuations start from."""
    x, memo = args
    if id(x) not in memo:
        memo[id(x)] = DualTensor(copy.deepcopy(x.primal, memo), copy.deepcopy(x.tangent, memo), x.stream)
    return memo[id(x)]


@rule("__iter__")
def iterate(func: Any, args: tuple, kwargs: dict) -> Any:
    return iter(view(torch.unbind, args, {}))


@rule(*_METADATA)
def metadata(func: Any, args: tuple, kwargs: dict) -> Any:
    return func(*primals(args), **primals(kwargs))


@rule(*_CONSTANTS)
def constant(func: Any, args: tuple, kwargs: dict) -> Any:
    """A result that does not depend on the values of its argument, or not differentiably."""
    return func(*primals(args), **primals(kwargs))


@rule(*_COMPARISONS)
def comparison(func: Any, args: tuple, kwargs: dict) -> Any:
    """Integers and booleans have no tangent; they stay in the stream so that a branch on them is noticed."""
    y = func(*primals(args), **primals(kwargs))
    return y if isinstance(y, bool) else wrap(y, None, next(duals((args, kwargs))).stream)


@rule("detach", "data")
def detached(func: Any, args: tuple, kwargs: dict) -> Any:
    return DualTensor.constants(func, args, kwargs)


@rule(*_VALUES)
def value(func: Any, args: tuple, kwargs: dict) -> Any:
    """Python and NumPy get F in a hook. The network itself would compute with it as with a constant."""
    if place(next(duals((args, kwargs))).stream) is Place.HOOK:
        return func(*collapse(args), **collapse(kwargs))
    raise TangentError(
        f"{where(func)}: takes the values of a tensor that carries a tangent out of the stream (a branch on values, a "
        "conversion to Python or NumPy); a tangent cannot follow. Use scope='layer', or torch.where for the branch"
    )


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def join(func: Any, args: tuple, kwargs: dict) -> Any:
    tensors = list(args[0])
    y = func(primals(tensors), *args[1:], **kwargs)
    with torch.no_grad():
        y_tangent = func([tangent_or_zeros(tensor, y.dtype) for tensor in tensors], *args[1:], **kwargs)
    return wrap(y, y_tangent, next(duals(tensors)).stream)


@rule("where")
def choose(func: Any, args: tuple, kwargs: dict) -> Any:
    """where(condition, a, b); as a method, condition.where is a.where(condition, b)."""
    if func is Tensor.where:
        args = (args[1], args[0], *args[2:])
    if len(args) + len(kwargs) == 1:
        return comparison(func, args, kwargs)
    condition, a, b = (*args, *kwargs.values())
    y = torch.where(primals(condition), primals(a), primals(b))
    tangents = [t.tangent if isinstance(t, DualTensor) else None for t in (a, b)]
    stream = next(duals((condition, a, b))).stream
    if all(t is None for t in tangents):
        return wrap(y, None, stream)
    with torch.no_grad():
        a_tangent, b_tangent = (y.new_zeros(()) if t is None else t.to(y.dtype) for t in tangents)
        return wrap(y, torch.where(primals(condition), a_tangent, b_tangent), stream)


@rule("masked_fill")
def masked_fill(func: Any, args: tuple, kwargs: dict) -> Any:
    x, mask, value = (*args, *kwargs.values())
    if not isinstance(x, DualTensor) or isinstance(value, DualTensor):
        return choose(torch.where, (mask, value, x), {})
    y = x.primal.masked_fill(primals(mask), value)
    with torch.no_grad():
        y_tangent = None if x.tangent is None else x.tangent.masked_fill(primals(mask), 0)
    return wrap(y, y_tangent, x.stream)


def tangent_or_zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(x, DualTensor) and x.tangent is not None:
        return x.tangent.to(dtype)
    return torch.zeros_like(primals(x), dtype=dtype)
