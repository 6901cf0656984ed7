"""Rules of sums, products and elementwise functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from linlora.stream.fallback import forward_mode
from linlora.stream.tensor import ONE, TWO, DualTensor, bound, duals, named, primals, rule, wrap


@rule("add", "__add__", "__radd__", "sub", "__sub__", "subtract")
def add(func: Any, args: tuple, kwargs: dict) -> Any:
    """a ± alpha b."""
    a, b, alpha = bound(TWO, args, kwargs, alpha=1)
    y = func(primals(a), primals(b), **kwargs)
    with torch.no_grad():
        return wrap(y, _signed(func, tangent(a), tangent(b), alpha), next(duals((a, b))).stream)


@rule("__rsub__", "rsub")
def subtract_from(func: Any, args: tuple, kwargs: dict) -> Any:
    """b − alpha a."""
    a, b, alpha = bound(TWO, args, kwargs, alpha=1)
    return -add(torch.sub, (a if alpha == 1 else alpha * a, b), {})


def _signed(func: Any, a: Tensor | None, b: Tensor | None, alpha: Any) -> Tensor | None:
    """a ± alpha b of tangents, None for zero."""
    alpha = alpha if "add" in func.__name__ else -alpha
    if b is None:
        return a
    if a is None:
        return b if alpha == 1 else alpha * b
    if alpha == 1 and b.is_contiguous():
        return torch.add(b, a)  # laid out as b: the primal may be transposed, its tangent need not
    return torch.add(a, b, alpha=alpha)


@rule("mul", "__mul__", "__rmul__", "multiply", "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "outer")
def product(func: Any, args: tuple, kwargs: dict) -> Any:
    """A bilinear function: f(a, b)_t = f(a_t, b) + f(a, b_t)."""
    a, b = bound(TWO, args, {})
    y = func(primals(a), primals(b), **kwargs)
    a_tangent, b_tangent = tangent(a), tangent(b)
    y_tangent = None
    with torch.no_grad():
        if a_tangent is not None:
            y_tangent = func(a_tangent, primals(b), **kwargs)
        fuses = func in _TIMES and not kwargs
        if fuses and y_tangent is not None and b_tangent is not None and y_tangent.dtype == b_tangent.dtype:
            y_tangent = y_tangent.addcmul_(primals(a), b_tangent)
        elif b_tangent is not None:
            term = func(primals(a), b_tangent, **kwargs)
            y_tangent = term if y_tangent is None else y_tangent + term
    return wrap(y, y_tangent, next(duals(args)).stream)


_TIMES = {*named("mul", "__mul__", "__rmul__", "multiply")}


@rule("grouped_mm", "_grouped_mm")
def grouped_product(func: Any, args: tuple, kwargs: dict) -> Any:
    """The product of each group of rows, which `offs` delimits, with a matrix of its own: the experts of a mixture."""
    a, b, offs, bias, dtype = bound(TWO, args, kwargs, offs=None, bias=None, out_dtype=None)
    if bias is not None:
        return forward_mode(func, args, kwargs)
    return product(func, (a, b), {"offs": offs, "out_dtype": dtype})


@rule("div", "__truediv__", "divide", "true_divide")
def quotient(func: Any, args: tuple, kwargs: dict) -> Any:
    """(a / b)_t = a_t / b − b_t (a / b) / b."""
    a, b, rounding_mode = bound(TWO, args, kwargs, rounding_mode=None)
    y = func(primals(a), primals(b), **kwargs)
    if rounding_mode is not None:
        return y
    a_tangent, b_tangent, divisor = tangent(a), tangent(b), primals(b)
    with torch.no_grad():
        y_tangent = None if a_tangent is None else a_tangent / divisor
        if b_tangent is not None:
            term = -b_tangent * (y / divisor)
            y_tangent = term if y_tangent is None else y_tangent + term
    return wrap(y, y_tangent, next(duals(args)).stream)


@rule("__rtruediv__", "__rdiv__")
def quotient_of(func: Any, args: tuple, kwargs: dict) -> Any:
    """b / a, as torch computes it with a number b."""
    a, b = bound(TWO, args, kwargs)
    return b * a.reciprocal()


@rule("pow", "__pow__", "float_power")
def power(func: Any, args: tuple, kwargs: dict) -> Any:
    """x^n with a number n; anything else is a fallback. x^0 is constant, at x = 0 too."""
    x, n = bound({"input": ..., "exponent": ...}, args, kwargs)
    if not isinstance(x, DualTensor) or not isinstance(n, (int, float)):
        return forward_mode(func, args, kwargs)
    y = func(x.primal, n)
    with torch.no_grad():
        slope = torch.zeros_like(y) if n == 0 else n * x.primal.to(y.dtype) ** (n - 1)
        return wrap(y, x.tangent * slope, x.stream)


_backward = torch.ops.aten


def _elementwise(jacobian: Any) -> Any:
    """The rule of a function of one tensor, from jacobian(x_t, x, y) = y_t."""

    def apply(func: Any, args: tuple, kwargs: dict) -> Any:
        (x,) = bound(ONE, args, kwargs)
        y = func(x.primal)
        with torch.no_grad():
            return wrap(y, jacobian(x.tangent, x.primal, y), x.stream)

    return apply


for _name, _jacobian in {
    "rsqrt": lambda t, x, y: -0.5 * t * y / x,
    "sqrt": lambda t, x, y: 0.5 * t / y,
    "square": lambda t, x, y: 2 * t * x,
    "reciprocal": lambda t, x, y: -t * y * y,
    "exp": lambda t, x, y: t * y,
    "log": lambda t, x, y: t / x,
    "sin": lambda t, x, y: t * x.cos(),
    "cos": lambda t, x, y: -t * x.sin(),
    "tanh": lambda t, x, y: _backward.tanh_backward.default(t, y.conj()),
    "sigmoid": lambda t, x, y: _backward.sigmoid_backward.default(t, y.conj()),
}.items():
    rule(_name)(_elementwise(_jacobian))


_ACTIVATIONS: dict[str, tuple[dict[str, float], Any]] = {
    "leaky_relu": ({"negative_slope": 0.01}, lambda t, x, a: _backward.leaky_relu_backward(t, x, a, False)),
    "elu": ({"alpha": 1.0}, lambda t, x, a: _backward.elu_backward(t, a, 1.0, 1.0, False, x)),
    "softplus": ({"beta": 1.0, "threshold": 20.0}, lambda t, x, b, a: _backward.softplus_backward(t, x, b, a)),
    "hardtanh": ({"min_val": -1.0, "max_val": 1.0}, lambda t, x, a, b: _backward.hardtanh_backward(t, x, a, b)),
    "relu6": ({}, lambda t, x: _backward.hardtanh_backward(t, x, 0.0, 6.0)),
    "mish": ({}, lambda t, x: _backward.mish_backward(t, x)),
    "hardswish": ({}, lambda t, x: _backward.hardswish_backward(t, x)),
    "logsigmoid": ({}, lambda t, x: t * torch.sigmoid(-x)),
}


def _activation(defaults: dict[str, float], jacobian: Any) -> Any:
    """An elementwise Jacobian is diagonal: aten's backward, given the tangent as cotangent, is the tangent."""

    def apply(func: Any, args: tuple, kwargs: dict) -> Any:
        x, *options = bound({**ONE, **defaults}, args, kwargs)
        if not isinstance(x, DualTensor):
            return forward_mode(func, args, kwargs)
        y = func(x.primal, *options)
        with torch.no_grad():
            return wrap(y, jacobian(x.tangent, x.primal, *options), x.stream)

    return apply


for _name, (_defaults, _jacobian) in _ACTIVATIONS.items():
    rule(_name)(_activation(_defaults, _jacobian))


@rule("abs", "absolute", "__abs__")
def absolute(func: Any, args: tuple, kwargs: dict) -> Any:
    (x,) = bound(ONE, args, kwargs)
    if x.is_complex():
        return forward_mode(func, args, kwargs)
    y = func(x.primal)
    with torch.no_grad():
        return wrap(y, x.tangent * x.primal.sign(), x.stream)


@rule("clamp", "clip", "clamp_min", "clamp_max")
def clamp(func: Any, args: tuple, kwargs: dict) -> Any:
    """Between numbers: the tangent where they do not bind."""
    x, *limits = bound({**ONE, "min": None, "max": None}, args, kwargs)
    if not isinstance(x, DualTensor) or any(isinstance(limit, Tensor) for limit in limits):
        return forward_mode(func, args, kwargs)
    y = func(x.primal, *args[1:], **kwargs)
    with torch.no_grad():
        return wrap(y, torch.where(x.primal == y, x.tangent, 0), x.stream)


@rule("softmax", "log_softmax")
def softmax(func: Any, args: tuple, kwargs: dict) -> Any:
    """y_t = y ⊙ (x_t − sum(y ⊙ x_t)), symmetric: aten's backward applies it. Its logarithm: x_t − sum(exp(y) ⊙ x_t)."""
    x, dim, _, _ = bound({**ONE, "dim": None, "dtype": None}, args, kwargs, _stacklevel=3)
    if dim is None:
        return forward_mode(func, args, kwargs)
    y = func(x.primal, *args[1:], **kwargs)
    with torch.no_grad():
        y_tangent = x.tangent.to(y.dtype)
        if "log" in func.__name__:
            return wrap(y, y_tangent - (y.exp() * y_tangent).sum(dim, keepdim=True), x.stream)
        return wrap(y, _backward._softmax_backward_data.default(y_tangent, y, dim, y.dtype), x.stream)


@rule("glu")
def glu(func: Any, args: tuple, kwargs: dict) -> Any:
    """(a σ(b))_t = a_t σ(b) + a σ'(b) b_t with a and b the halves of x, in float32 or wider."""
    x, dim = bound({**ONE, "dim": -1}, args, kwargs)
    y = func(x.primal, dim)
    with torch.no_grad():
        wide = torch.promote_types(x.dtype, torch.float32)
        (a, b), (a_tangent, b_tangent) = (half.to(wide).chunk(2, dim) for half in (x.primal, x.tangent))
        gate = b.sigmoid()
        return wrap(y, torch.addcmul(a_tangent * gate, a, _backward.sigmoid_backward(b_tangent, gate)), x.stream)


@rule("var", "std", "var_mean", "std_mean")
def spread(func: Any, args: tuple, kwargs: dict) -> Any:
    """With c = x − mean: var_t = 2 sum(c ⊙ x_t) / (n − correction), and std_t = var_t / (2 std), 0 where std is 0."""
    if len(args) == 2 and isinstance(args[-1], bool):  # x.var(unbiased)
        args, kwargs = args[:-1], {"unbiased": args[-1], **kwargs}
    x, dim, unbiased, keepdim, correction = bound(_SPREAD, args, kwargs, correction=None)
    correction = int(unbiased) if correction is None else correction
    over = [dim] if isinstance(dim, int) else list(dim or range(x.dim()))
    count = math.prod(x.shape[d] for d in over) - correction
    if x.is_complex() or count <= 0:
        return forward_mode(func, args, kwargs)
    y = func(x.primal, *args[1:], **kwargs)
    with torch.no_grad():
        centred = x.primal - x.primal.mean(over, keepdim=True)
        total = (centred * x.tangent).sum(over, keepdim=keepdim) / count
        if "std" in func.__name__:
            std = y[0] if isinstance(y, tuple) else y
            total = (total / std).masked_fill_(std == 0, 0.0)
        else:
            total = 2 * total
        tangents = [total, x.tangent.mean(over, keepdim=keepdim)] if isinstance(y, tuple) else total
        return wrap(y, tangents, x.stream)


_SPREAD = {**ONE, "dim": None, "unbiased": True, "keepdim": False}


def tangent(x: Any) -> Tensor | None:
    """The tangent of an argument; None where it has none."""
    return x.tangent if isinstance(x, DualTensor) else None
