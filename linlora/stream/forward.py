"""The stream of `linlora.functional.dual`: the tangents of a network in its inputs, whose parameters train.

It differs from model scope's in what a tensor means. There the network is linearized, F = f + J δ, and frozen but for
an adapter; here `primal` is what the module computes, with the module's own graph, so that

    the primal runs as the module writes it, under autograd with its real weights; only the tangent is ours
    losses are functions like others
    torch.no_grad() takes the graph away, not the tangent, as in torch.func.jvp
    branches and numbers of Python are those of the primal

The rules here come before those of `linlora.stream.fused` and `structural`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from linlora.ops import aten
from linlora.ops.aten.activations import JACOBIAN
from linlora.ops.backends import select_op
from linlora.stream import attention, fused, structural
from linlora.stream.caller import called_by, refuse_inside_function, where
from linlora.stream.fallback import forward_mode
from linlora.stream.multilinear import affine
from linlora.stream.tensor import (
    DualTensor,
    Rule,
    Stream,
    TangentError,
    bound,
    duals,
    named,
    primals,
    wrap,
)


class ForwardStream(Stream):
    """The stream of one call of `dual`.

    Attributes:
        running: whether that call runs. Afterwards a DualTensor that somebody kept is its primal to every function,
            but for the recomputation of a checkpoint in the backward, which runs the network again.
    """

    rules: ClassVar[dict[Any, Rule]] = {}
    otherwise = "detach() its argument, whose tangent then ends there"
    guarded = True

    def __init__(self) -> None:
        super().__init__()
        self.running = False

    def inside(self) -> bool:
        return self.running or torch._C._current_graph_task_id() != -1

    def outside(self, func: Any, args: tuple, kwargs: dict) -> Any:
        return func(*primals(args), **primals(kwargs))

    def blocked(self, func: Any, found: list[DualTensor]) -> bool:
        refuse_inside_function(where(func), self.otherwise)
        return False


def _rule(*names: str) -> Any:
    def register(function: Rule) -> Rule:
        ForwardStream.rules.update({target: function for name in names for target in named(name)})
        return function

    return register


_rule("linear")(affine)
_rule(*fused.LOSSES, *fused.LOSSES_OF_PROBABILITIES)(forward_mode)


@_rule("addmm")
def addmm(func: Any, args: tuple, kwargs: dict) -> Any:
    """beta bias + alpha a b."""
    bias, a, b, beta, alpha = bound(fused.ADDMM, args, kwargs, beta=1, alpha=1)
    y = func(*primals(args), **primals(kwargs))
    with torch.no_grad():
        terms = [torch.mm(x.tangent, primals(b)) for x in (a,) if isinstance(x, DualTensor)]
        terms += [torch.mm(primals(a), x.tangent) for x in (b,) if isinstance(x, DualTensor)]
        terms = terms if alpha == 1 else [alpha * term for term in terms]
        terms += [beta * x.tangent for x in (bias,) if isinstance(x, DualTensor)]
        return wrap(y, sum(terms[1:], terms[0]), next(duals((bias, a, b))).stream)


@_rule("gelu", "silu", "relu")
def activation(func: Any, args: tuple, kwargs: dict) -> Any:
    """As the module writes it, with aten's backward for the tangent. A kernel computes both streams in one launch."""
    x, kind = fused.activated(func, args, kwargs)
    if select_op("activation", x.primal) is not aten:
        return fused.activation(func, args, kwargs)
    y = func(x.primal, **kwargs)
    with torch.no_grad():
        return wrap(y, JACOBIAN[kind](x.tangent, x.primal), x.stream)


@_rule("layer_norm")
def layer_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    """y = w ⊙ x̂ + b,  y_t = w ⊙ J x_t + w_t ⊙ x̂ + b_t,  J = ∂x̂/∂x, symmetric: aten's backward applies it."""
    x, shape, weight, bias, eps = bound(fused.LAYER_NORM, args, kwargs)
    shape = [shape] if isinstance(shape, int) else list(shape)
    stream = next(duals((x, weight, bias))).stream
    primal = primals(x).contiguous()  # which the norm, its tangent and its backward would each copy
    y, mean, rstd = torch.native_layer_norm(primal, shape, primals(weight), primals(bias), eps)
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        total = None
        if isinstance(x, DualTensor):
            dtype = mean.dtype if mean.device.type == "cpu" else y.dtype  # a CPU takes one: float32, of wide weights
            total = torch.ops.aten.native_layer_norm_backward.default(
                x.tangent.to(dtype), primal.to(dtype), shape, mean, rstd, None, None, [True, False, False]
            )[0]
            total = total if weight is None else total.mul_(primals(weight))
        if isinstance(weight, DualTensor):
            term = (primal - mean) * rstd * weight.tangent
            total = term if total is None else total + term
        if isinstance(bias, DualTensor):
            total = bias.tangent if total is None else total + bias.tangent
    return wrap(y, total, stream)


@_rule("rms_norm")
def rms_norm(func: Any, args: tuple, kwargs: dict) -> Any:
    """y = w ⊙ x̂,  y_t = w ⊙ rstd (x_t − x̂ mean(x̂ ⊙ x_t)) + w_t ⊙ x̂."""
    x, shape, weight, eps = bound(fused.RMS_NORM, args, kwargs)
    if not isinstance(x, DualTensor):
        return forward_mode(func, args, kwargs)
    y = func(x.primal, shape, primals(weight), eps)
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        wide = torch.promote_types(x.primal.dtype, torch.float32)
        primal, tangent = x.primal.to(wide), x.tangent.to(wide)
        over = list(range(-len(shape), 0))
        rstd = primal.square().mean(over, keepdim=True).add_(fused.rms_eps(x.primal, eps)).rsqrt_()
        normalized = primal * rstd
        y_tangent = (tangent - normalized * (normalized * tangent).mean(over, keepdim=True)).mul_(rstd)
        y_tangent = y_tangent if weight is None else y_tangent.mul_(primals(weight))
        if isinstance(weight, DualTensor):
            y_tangent = y_tangent + normalized * weight.tangent
    return wrap(y, y_tangent, x.stream)


@_rule("scaled_dot_product_attention")
def any_attention(func: Any, args: tuple, kwargs: dict) -> Any:
    """The fused op, which takes no gradient of a mask; where one is asked for, or carries a tangent, its pieces."""
    q, k, v, mask, *_ = bound(attention.ATTENTION, args, kwargs)
    trains = isinstance(mask, DualTensor) or (isinstance(mask, Tensor) and mask.requires_grad)
    rule = attention.composed if trains or not attention.fits(q, k, v) else attention.attention
    return rule(func, args, kwargs)


# numbers and branches of Python are the primal's, as in torch.func.jvp
_rule(
    "__int__", "__float__", "__complex__", "__index__", "__bool__", "__format__", "item", "tolist", "is_nonzero",
    "__contains__",
)(structural.constant)  # fmt: skip


def refuse_grad(func: Any, args: tuple, kwargs: dict) -> Any:
    raise TangentError(
        f"{where(func)}: a gradient taken inside of a network that carries tangents; nest torch.func.grad and "
        "torch.func.jvp"
    )


ForwardStream.rules[torch.autograd.grad] = refuse_grad


@_rule("detach")
def detached(func: Any, args: tuple, kwargs: dict) -> Any:
    """The tangent ends; torch.autograd.functional, which detaches what it differentiates in, would have none."""
    if called_by(torch.autograd.functional):
        refuse_grad(func, args, kwargs)
    return structural.detached(func, args, kwargs)
