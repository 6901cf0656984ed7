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
copy of W. Composed ops save the factors in the dtype of x, and a mask of dropout.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.kernels.problem import FACTORS, FROZEN, FactorGradients, Gradients, LoraLinear, Result
from linlora.ops import aten, backends, composed
from linlora.ops.checks import autocast_input
from linlora.ops.composed import backward_backend
from linlora.ops.rows import as_rows, of_rows
from linlora.ops.transforms import intercepts, transform_active

Fields: Any = LoraLinear
"""Something of the fields of a problem: which ask for gradients, or the gradients."""

_NOTHING = Fields(*[None] * len(LoraLinear._fields))


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
        dropout_p, seed: LoRA dropout of the low-rank branch, one mask for primal and tangent. It is drawn by torch's
            generator, or made from `seed`, a 0-d int64 tensor on x's device. Kernels recompute it in backward; composed
            ops keep it, a byte an element.

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
    return run(problem.check())


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

    Args, dtypes and errors are those of `lora_linear`, without an x_tangent.

    Returns: its y + y_tangent, (..., N), added before rounding.

    Formula (arXiv 2310.04742, at the scope of one layer)::

        x Wᵀ + b + s [ (x A0ᵀ)(B0 + dB)ᵀ + (x dAᵀ) B0ᵀ ]

    >>> import torch
    >>> x, W, A0, dB = torch.ones(2, 3), torch.eye(3), torch.ones(1, 3), torch.ones(3, 1)
    >>> linearized_lora_linear(x, W, None, A0, None, None, dB, 0.5)[0].tolist()
    [2.5, 2.5, 2.5]
    """
    problem = LoraLinear(autocast_input(x), weight, bias, A0, B0, dA, dB, scaling, None, dropout_p, seed)
    return run(problem.check())


def run(problem: LoraLinear, constant_tangent: bool = False) -> Any:
    """y of one stream, (y, y_tangent) of two, (..., N), for callers that have checked the problem; x has its dtype.

    `constant_tangent` is model scope: gradients of the primal, for x, dA and dB.
    """
    if problem.expand is None and problem.d_shrink is not None:
        problem = problem._replace(d_shrink=None)
    transformed = not constant_tangent and (transform_active() or intercepts(problem.x))
    backend = aten if transformed else backends.select_layer(problem)
    problem = composed.with_dropout(backend, problem)
    if not (transformed or torch.is_grad_enabled()):
        return _shaped(backend.lora_linear(_matrices(backend, problem), save=False), problem)
    if transformed or composed.preferred(backend, problem.x, problem.weight, problem.rank, problem.dropout_p):
        if not constant_tangent:
            result = aten.lora_linear(problem, recorded=True)
            return result[:2] if problem.two_streams else result.y
        backend = aten
    return _LoraLinear.apply(backend, constant_tangent, *problem)


def _matrices(backend: ModuleType, problem: LoraLinear) -> LoraLinear:
    """The problem as a backend takes it: rows for leading dimensions, and for kernels, which cast factors alone, the
    frozen layer in the dtype of x."""
    if backend is not aten:
        problem = problem.like_x(FROZEN)
    if problem.x.dim() == 2:
        return problem
    return LoraLinear(as_rows(problem.x), *problem[1:8], _rows(problem.x_tangent), *problem[9:])


def _shaped(result: Result, problem: LoraLinear) -> Any:
    """The outputs with the leading dimensions of x."""
    y = of_rows(result.y, problem.x)
    return (y, of_rows(result.y_tangent, problem.x)) if problem.two_streams else y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: ModuleType, constant_tangent: bool, *fields: Any) -> Any:
        problem, needs = LoraLinear(*fields), Fields(*ctx.needs_input_grad[2:])
        dtype = problem.d_expand.dtype
        if backend is aten:
            problem = aten.kept_factors(problem)
        if constant_tangent:
            needs = _needs(x=needs.x, d_shrink=needs.d_shrink, d_expand=needs.d_expand)
        rows = _matrices(backend, problem)
        result = backend.lora_linear(rows, save=needs.d_expand or needs.expand)
        saves_u = needs.d_expand or (needs.expand and problem.two_streams)
        ctx.save_for_backward(
            problem.x if needs.weight or needs.shrink or needs.d_shrink else None,
            problem.x_tangent if needs.weight or needs.shrink else None,
            problem.weight,
            *problem[3:7],
            problem.seed,
            result.u if saves_u else None,
            aten.c_of(rows, result.c) if needs.expand else None,
        )
        ctx.numbers, ctx.dtype = (problem.scaling, problem.dropout_p, problem.two_streams), dtype
        ctx.backend, ctx.needs, ctx.constant_tangent, ctx.x_shape = backend, needs, constant_tangent, problem.x.shape
        ctx.set_materialize_grads(False)
        outputs = _shaped(result, problem)
        if constant_tangent:
            ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_tangent: Tensor | None = None) -> tuple[Any, ...]:
        x, x_tangent, weight, *factors, seed, u, c = ctx.saved_tensors
        scaling, dropout_p, two_streams = ctx.numbers
        op = "lora_linear" if two_streams else "linearized_lora_linear"
        backend = backward_backend(op, ctx.backend, g, g_tangent)
        lead = g if g_tangent is None else g_tangent
        if lead is None:
            return (None, None, *_needs())
        fields: Any = (_rows(x), weight, None, *factors, scaling, _rows(x_tangent), dropout_p, seed, two_streams)
        problem = LoraLinear(*fields)
        if two_streams and g_tangent is None:
            of = _gradients_of_primal(backend, problem, ctx.dtype, as_rows(lead), u, ctx.needs, ctx.constant_tangent)
        else:
            of = _gradients(backend, problem, ctx.dtype, (_rows(g), _rows(g_tangent)), (u, c), ctx.needs)
        dx, dx_tangent, shape = of.x, of.x_tangent, ctx.x_shape
        return (
            None, None, None if dx is None else dx.view(shape), *of[1:8],
            None if dx_tangent is None else dx_tangent.view(shape), *of[9:],
        )  # fmt: skip


def _needs(**fields: Any) -> Any:
    """`Fields`, None of those that are not given."""
    return _NOTHING._replace(**fields) if fields else _NOTHING


def _gradients(
    backend: ModuleType,
    problem: LoraLinear,
    dtype: torch.dtype,
    cotangents: tuple[Tensor | None, Tensor | None],
    low: tuple[Tensor | None, Tensor | None],
    needs: Any,
) -> Any:
    """The gradients of the fields, of matrices, from the cotangents of (y, y_tangent) and the saved (u, c)."""
    (g, g_tangent), (u, c), two = cotangents, low, problem.two_streams
    adjoint = problem.adjoint(g, g_tangent)
    y = y_tangent = u_adjoint = c_adjoint = None
    if needs.x or needs.x_tangent:
        y, y_tangent, u_adjoint, c_adjoint = backend.lora_linear(
            adjoint.like_x(FROZEN), save=needs.shrink or needs.d_shrink, primal=not two or needs.x_tangent
        )
    elif needs.shrink or needs.d_shrink:
        u_adjoint, c_adjoint = aten.low_rank(adjoint.like_x(FACTORS), with_c=needs.shrink)
    if problem.is_pair and needs.shrink:
        c_adjoint = aten.c_of(adjoint, c_adjoint)
    of_A0 = c_adjoint if problem.is_pair else u_adjoint
    p, q = _chosen(u, needs.d_expand, c, needs.expand), _chosen(u_adjoint, needs.d_shrink, of_A0, needs.shrink)
    d_expand, d_shrink = _products(backend, problem, dtype, p, adjoint.x, q, problem.x)
    d_dB, d_B0 = _divided(d_expand, needs.d_expand, needs.expand, dim=1)
    d_dA, d_A0 = _divided(d_shrink, needs.d_shrink, needs.shrink, dim=0)
    if two and problem.is_pair:
        if needs.shrink and problem.x_tangent is not None:
            d_A0 = d_A0 + _products(backend, problem, dtype, None, None, u_adjoint, problem.x_tangent).d_shrink
        if needs.expand and g is not None:
            d_B0 = d_B0 + _products(backend, problem, dtype, u, g, None, None).d_expand
    d_weight = _sum(_outer(g, problem.x), _outer(g_tangent, problem.x_tangent)) if needs.weight else None
    d_bias = g.sum(0) if needs.bias and g is not None else None
    dx, dx_tangent = (y_tangent, y) if two else (y, None)
    return Fields(dx, d_weight, d_bias, d_A0, d_B0, d_dA, d_dB, None, dx_tangent, None, None, None, None)


def _gradients_of_primal(
    backend: ModuleType,
    problem: LoraLinear,
    dtype: torch.dtype,
    g: Tensor,
    u: Tensor | None,
    needs: Any,
    constant_tangent: bool,
) -> Any:
    """The gradients where the primal of two streams alone is differentiated. At model scope those of A0 and B0 are the
    gradients of dA and dB, that of B0 = 0 included."""
    of_A, of_B = (needs.d_shrink, needs.d_expand) if constant_tangent else (needs.shrink, needs.expand)
    if problem.is_pair:
        asked = Fields(*needs[:3], of_A, None, None, of_B, None)
        found = _gradients(backend, problem.primal(), dtype, (g, None), (u, None), asked)
    else:
        found = _needs(
            x=g @ problem.weight.to(g.dtype) if needs.x else None,
            weight=_outer(g, problem.x) if needs.weight else None,
            bias=g.sum(0) if needs.bias else None,
            d_expand=_products(backend, problem, dtype, u if of_B else None, g, None, None).d_expand,
        )
    dx, d_weight, d_bias, d_A, _, _, d_B, *rest = found
    factors = (None, None, d_A, d_B) if constant_tangent else (d_A, d_B, None, None)
    return Fields(dx, d_weight, d_bias, *factors, *rest)


def _products(
    backend: ModuleType,
    problem: LoraLinear,
    dtype: torch.dtype,
    p: Tensor | None,
    g: Tensor | None,
    q: Tensor | None,
    x: Tensor | None,
) -> Gradients:
    """s gᵀ p and s qᵀ x', in one reading of g and x; None for a p or q that is None."""
    if p is None and q is None:
        return Gradients()
    return backend.factor_gradients(
        FactorGradients(
            p, None if p is None else g, q, None if q is None else x,
            problem.scaling, dtype, problem.dropout_p, problem.seed,
        )
    )  # fmt: skip


def _chosen(first: Tensor | None, takes_first: bool, second: Tensor | None, takes_second: bool) -> Tensor | None:
    """The columns of the blocks that are taken, side by side."""
    if takes_first and takes_second:
        assert first is not None
        assert second is not None
        return torch.cat((first, second), 1)
    return first if takes_first else second if takes_second else None


def _divided(product: Tensor | None, has_first: bool, has_second: bool, dim: int) -> tuple[Any, ...]:
    """The parts of a product with what `_chosen` chose."""
    if has_first and has_second:
        assert product is not None
        return product.chunk(2, dim)
    return (product, None) if has_first else (None, product)


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def _outer(g: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if g is None or x is None else g.t() @ x


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
