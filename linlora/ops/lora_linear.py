"""The LoRA layer as a differentiable op: one stream or two, one autograd Function for both scopes.

    one stream      y    = x W ᵀ  + b + s [ c B0ᵀ + u dBᵀ ]      u = x' A0ᵀ     c = x' (A0 + dA)ᵀ
    two streams     y    = x W ᵀ  + b + s u B0ᵀ                  u = x' A0ᵀ     c = x' dAᵀ + x_t' A0ᵀ
                    y_t  = x_t Wᵀ + s [ c B0ᵀ + u dBᵀ ]

The backward is the adjoint problem, that of the transposes with two streams swapped, on the same backend. Let g be the
cotangent of y of one stream, or of y_t of two, and g' that of y of two:

    one stream      dx   = g W   + s [ c̄ A0 + ū dA ]             ū = g B0       c̄ = g (B0 + dB)
    two streams     dx_t = g W   + s ū A0                        ū = g B0       c̄ = g dB + g' B0
                    dx   = g' W  + s [ c̄ A0 + ū dA ]

                    d dB = s gᵀ u     d B0 = s gᵀ c  [ + s g'ᵀ u ]
                    d dA = s ūᵀ x'    d A0 = s c̄ᵀ x' [ + s ūᵀ x_t' ]

At B0 = 0 the terms with B0 and dA drop out, and ū = g dB takes the place of c̄. The primal of two streams alone is plain
LoRA at (A0, B0). Model scope differentiates that: a network linearized at φ0 is f(φ0) + J δ, whose derivative by δ is
the derivative of f at φ0, whatever δ is. So its tangent is a constant to autograd, and dA and dB receive what A0 and B0
would.

Saved for backward: u and c (M, r) where dB or B0 asks for a gradient, x and x_t where W, A0 or dA does, the factors; no
copy of W.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.kernels.packing import pack, unpack
from linlora.kernels.problem import FactorGradients, LoraLinear, Result
from linlora.ops import aten, backends, composed
from linlora.ops.checks import autocast_enabled, autocast_input
from linlora.ops.composed import backward_backend
from linlora.ops.rows import as_rows
from linlora.ops.transforms import transform_active

_NOTHING: Any = LoraLinear(*[None] * len(LoraLinear._fields))
"""No gradient of any field."""


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    x_tangent: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The primal and the tangent of one LoRA layer, as a differentiable op in one launch.

    Args:
        x: (..., K), float32, float16 or bfloat16 (float64 on the torch backend).
        weight: (N, K), of x's dtype, any strides. bias: (N,) or None.
        A0, dA: (r, K). B0, dB: (N, r). float32 or of x's dtype. `B0=None` means B0 = 0; dA is then without effect.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        x_tangent: like x, or None where the input has no tangent.
        dropout_p, seed: LoRA dropout of the low-rank branch, one mask for primal and tangent, made from `seed`, a 0-d
            int64 tensor on x's device; the mask is recomputed in backward, not saved.

    Returns: (y, y_tangent), both (..., N), in the dtype of x (of autocast, where it is on).

    Formula (arXiv 2310.04742)::

        y   = x Wᵀ + b + s (x A0ᵀ) B0ᵀ
        y_t = x_t Wᵀ + s [ (x_t A0ᵀ) B0ᵀ + (x A0ᵀ) dBᵀ + (x dAᵀ) B0ᵀ ]

    Raises ValueError for shapes, dtypes or devices that do not fit, BackendUnavailableError under `use_backend`.

    >>> import torch
    >>> x, W, A0, dB = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> y, y_tangent = lora_linear(x, W, None, A0, None, None, dB, 0.5)
    >>> y[0].tolist(), y_tangent[0].tolist()
    ([1.0, 1.0, 1.0], [1.5, 1.5, 1.5])
    """
    x_tangent = None if x_tangent is None else autocast_input(x_tangent)
    problem = LoraLinear(
        autocast_input(x), weight, bias, A0, B0, dA, dB, scaling, x_tangent, dropout_p, seed, two_streams=True
    )
    return run(problem.check(autocast=autocast_enabled(x.device.type)))


def linearized_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Layer-scope linearized LoRA: primal + tangent of one layer, as a differentiable op in one launch.

    Args:
        x: (..., K), float32, float16 or bfloat16 (float64 on the torch backend).
        weight: (N, K), of x's dtype, any strides. bias: (N,) or None.
        A0, dA: (r, K). B0, dB: (N, r). float32 or of x's dtype. `B0=None` means B0 = 0; dA is then without effect.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        dropout_p, seed: LoRA dropout of the low-rank branch, one mask for primal and tangent, made from `seed`, a 0-d
            int64 tensor on x's device; the mask is recomputed in backward, not saved.

    Returns: y + y_tangent of `lora_linear` for an input without tangent, (..., N), added before rounding.

    Formula (arXiv 2310.04742, at the scope of one layer)::

        x Wᵀ + b + s [ (x A0ᵀ)(B0 + dB)ᵀ + (x dAᵀ) B0ᵀ ]

    Raises ValueError for shapes, dtypes or devices that do not fit, BackendUnavailableError under `use_backend`.

    >>> import torch
    >>> x, W, A0, dB = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> linearized_lora_linear(x, W, None, A0, None, None, dB, 0.5)[0].tolist()
    [2.5, 2.5, 2.5]
    """
    problem = LoraLinear(autocast_input(x), weight, bias, A0, B0, dA, dB, scaling, None, dropout_p, seed)
    return run(problem.check(autocast=autocast_enabled(x.device.type)))


def run(problem: LoraLinear, constant_tangent: bool = False) -> Any:
    """y of one stream, (y, y_tangent) of two, (..., N), for callers that have checked the problem; x has its dtype.

    `constant_tangent` is model scope: gradients of the primal, for x, dA and dB.
    """
    if problem.expand is None and problem.d_shrink is not None:
        problem = problem._replace(d_shrink=None)
    if not constant_tangent and transform_active():
        return _shaped(aten.lora_linear(_matrices(problem)), problem)
    backend = backends.select_layer(problem)
    if composed.preferred(backend, problem.x, problem.weight, problem.rank, problem.dropout_p):
        if not constant_tangent:
            return _shaped(aten.lora_linear(_matrices(problem)), problem)
        backend = aten
    if not torch.is_grad_enabled():
        return _shaped(backend.lora_linear(_matrices(problem), save=False), problem)
    return _LoraLinear.apply(backend, constant_tangent, *problem)


def _matrices(problem: LoraLinear) -> LoraLinear:
    """The problem as backends take it: rows for leading dimensions, the frozen layer in the dtype of x."""
    x, weight, bias, x_tangent = problem.x, problem.weight, problem.bias, problem.x_tangent
    return problem._replace(
        x=as_rows(x),
        weight=weight.to(x.dtype),
        bias=None if bias is None else bias.to(x.dtype),
        x_tangent=_rows(x_tangent),
    )


def _shaped(result: Result, problem: LoraLinear) -> Any:
    """The outputs with the leading dimensions of x."""
    shape = (*problem.x.shape[:-1], problem.weight.shape[0])
    y = result.y.reshape(shape)
    return (y, result.y_tangent.reshape(shape)) if problem.two_streams else y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: ModuleType, constant_tangent: bool, *fields: Any) -> Any:
        problem, needs = LoraLinear(*fields), _needs(ctx.needs_input_grad, constant_tangent)
        result = backend.lora_linear(_matrices(problem), save=needs.d_expand or needs.expand)
        kept = problem._replace(
            x=problem.x if needs.weight or needs.shrink or needs.d_shrink else None,
            x_tangent=problem.x_tangent if needs.weight or needs.shrink else None,
            bias=None,
        )
        tensors, ctx.numbers = pack(kept)
        saves_u = needs.d_expand or (needs.expand and problem.two_streams)
        ctx.save_for_backward(*tensors, result.u if saves_u else None, result.c if needs.expand else None)
        ctx.backend, ctx.constant_tangent, ctx.x_shape = backend, constant_tangent, problem.x.shape
        ctx.set_materialize_grads(False)
        outputs = _shaped(result, problem)
        if constant_tangent:
            ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_tangent: Tensor | None = None) -> tuple[Any, ...]:
        *tensors, u, c = ctx.saved_tensors
        problem, needs = unpack(LoraLinear, tensors, ctx.numbers), _needs(ctx.needs_input_grad, ctx.constant_tangent)
        backend = backward_backend(problem.op, ctx.backend, g, g_tangent)
        lead = g if g_tangent is None else g_tangent
        if lead is None:
            return (None, None, *_NOTHING)
        problem = problem._replace(
            x=_rows(problem.x), x_tangent=_rows(problem.x_tangent), weight=problem.weight.to(lead.dtype)
        )
        if problem.two_streams and g_tangent is None:
            of = _gradients_of_primal(backend, problem, as_rows(lead), u, needs, ctx.constant_tangent)
        else:
            of = _gradients(backend, problem, (_rows(g), _rows(g_tangent)), (u, c), needs)
        of = of._replace(
            x=None if of.x is None else of.x.view(ctx.x_shape),
            x_tangent=None if of.x_tangent is None else of.x_tangent.view(ctx.x_shape),
        )
        return (None, None, *of)


def _needs(needs_input_grad: tuple[bool, ...], constant_tangent: bool) -> LoraLinear:
    """Which fields of a problem ask for a gradient, and may."""
    needs = LoraLinear(*needs_input_grad[2:])
    if not constant_tangent:
        return needs
    return _NOTHING._replace(x=needs.x, d_shrink=needs.d_shrink, d_expand=needs.d_expand)


def _gradients(
    backend: ModuleType,
    problem: LoraLinear,
    cotangents: tuple[Tensor | None, Tensor | None],
    low: tuple[Tensor | None, Tensor | None],
    needs: LoraLinear,
) -> LoraLinear:
    """The gradients of the fields, of matrices, from the cotangents of (y, y_tangent) and the saved (u, c)."""
    (g, g_tangent), (u, c), two = cotangents, low, problem.two_streams
    adjoint = problem.adjoint(g, g_tangent)
    y = y_tangent = u_adjoint = c_adjoint = None
    if needs.x or needs.x_tangent:
        y, y_tangent, u_adjoint, c_adjoint = backend.lora_linear(
            adjoint, save=needs.shrink or needs.d_shrink, primal=not two or needs.x_tangent
        )
    elif needs.shrink or needs.d_shrink:
        u_adjoint, c_adjoint = aten.low_rank(adjoint, with_c=needs.shrink)
    of_A0 = c_adjoint if problem.is_pair else u_adjoint
    (d_dB, d_B0), (d_dA, d_A0) = _products(
        backend, problem, (adjoint.x, (u if needs.d_expand else None, c if needs.expand else None)),
        (problem.x, (u_adjoint if needs.d_shrink else None, of_A0 if needs.shrink else None)),
    )  # fmt: skip
    if two and problem.is_pair:
        _, (of_tangent,) = _products(
            backend, problem, (None, ()), (problem.x_tangent, (u_adjoint if needs.shrink else None,))
        )  # fmt: skip
        (of_primal,), _ = _products(backend, problem, (g, (u if needs.expand else None,)), (None, ()))
        d_A0, d_B0 = _sum(d_A0, of_tangent), _sum(d_B0, of_primal)
    return _NOTHING._replace(
        x=y_tangent if two else y,
        x_tangent=y if two else None,
        weight=_sum(_outer(g, problem.x), _outer(g_tangent, problem.x_tangent)) if needs.weight else None,
        bias=g.sum(0) if needs.bias and g is not None else None,
        shrink=d_A0,
        expand=d_B0,
        d_shrink=d_dA,
        d_expand=d_dB,
    )


def _gradients_of_primal(
    backend: ModuleType, problem: LoraLinear, g: Tensor, u: Tensor | None, needs: LoraLinear, constant_tangent: bool
) -> LoraLinear:
    """The gradients where the primal of two streams alone is differentiated. At model scope those of A0 and B0 are the
    gradients of dA and dB, those of B0 = 0 included."""
    of_A, of_B = (needs.d_shrink, needs.d_expand) if constant_tangent else (needs.shrink, needs.expand)
    if problem.is_pair:
        asked = _NOTHING._replace(x=needs.x, weight=needs.weight, bias=needs.bias, shrink=of_A, d_expand=of_B)
        found = _gradients(backend, problem.primal(), (g, None), (u, None), asked)
    else:
        (d_B,), _ = _products(backend, problem, (g, (u if of_B else None,)), (None, ()))
        found = _NOTHING._replace(
            x=g @ problem.weight if needs.x else None,
            weight=_outer(g, problem.x) if needs.weight else None,
            bias=g.sum(0) if needs.bias else None,
            d_expand=d_B,
        )
    d_A, d_B = found.shrink, found.d_expand
    if constant_tangent:
        return found._replace(shrink=None, d_shrink=d_A)
    return found._replace(expand=d_B, d_expand=None)


Wide = tuple[Tensor | None, tuple[Tensor | None, ...]]


def _products(backend: ModuleType, problem: LoraLinear, of_g: Wide, of_x: Wide) -> tuple[list[Any], list[Any]]:
    """s gᵀ p for every p of (g, ps) and s qᵀ x' for every q of (x, qs), in one reading of g and x; None gives None."""
    (g, all_p), (x, all_q) = of_g, of_x
    ps, qs = (
        () if wide is None else tuple(low for low in all_low if low is not None) for wide, all_low in (of_g, of_x)
    )
    if not ps and not qs:
        return [None] * len(all_p), [None] * len(all_q)
    d_expand, d_shrink = backend.factor_gradients(
        FactorGradients(
            _columns(ps), g if ps else None, _columns(qs), x if qs else None,
            problem.scaling, problem.d_expand.dtype, problem.dropout_p, problem.seed,
        )
    )  # fmt: skip
    expands = iter(d_expand.split([p.shape[1] for p in ps], dim=1) if ps else ())
    shrinks = iter(d_shrink.split([q.shape[1] for q in qs], dim=0) if qs else ())
    return (
        [None if p is None or g is None else next(expands) for p in all_p],
        [None if q is None or x is None else next(shrinks) for q in all_q],
    )


def _columns(blocks: tuple[Tensor, ...]) -> Tensor | None:
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)) if blocks else None


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def _outer(g: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if g is None or x is None else g.t() @ x


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
