"""`grouped_lora_linear`: a LoRA layer with factors of its own for every group of rows.

    forward    y  = x Wᵀ + b + s [ c B0ᵀ + u B_t ]      u = x' A0ᵀ      c = u + x' A_t
    backward   dx = g W      + s [ c̄ A0  + ū A_tᵀ ]     ū = g B0        c̄ = ū + g B_tᵀ

               dB_t = s uᵀ g     dA_t = s x'ᵀ ū          sums over the rows of group t
               dB0  = s gᵀ c     dA0  = s c̄ᵀ x'          sums over all rows

The backward of the op is the op of the transposes. What the point (A0, B0) leaves out:

    plain routing     y = x Wᵀ + b + s c B_t,  c = x' A_t      dx = g W + s c̄ A_tᵀ,  c̄ = g B_tᵀ
    B0 = 0            y = x Wᵀ + b + s u B_t,  u = x' A0ᵀ      dx = g W + s c̄ A0,    c̄ = g B_tᵀ

Model scope runs both streams, at the point (A0, B0) that all rows share; its tangent is a constant to autograd:

    forward    y  = x W ᵀ  + b + s u B0ᵀ             y_t = x_t Wᵀ + s [ c B0ᵀ + u B_t ],  c = x' A_t + x_t' A0ᵀ
    backward   dx = g W + s ū A0    dB_t, dA_t as above

Saved for backward: the u or c that B_t multiplies (M, r), x if A_t, A0 or W trains, the factors, no copy of W.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.kernels.grouped_problem import GroupedGradients, GroupedLoraLinear
from linlora.kernels.problem import FactorGradients
from linlora.ops import backends, composed, lora_linear
from linlora.ops.checks import autocast_input
from linlora.ops.composed import backward_backend
from linlora.ops.grouping import Groups
from linlora.ops.mixing import by_groups
from linlora.ops.rows import as_rows, of_rows
from linlora.ops.transforms import intercepts, transform_active

Fields: Any = GroupedLoraLinear
"""Which fields of a problem ask for gradients."""


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    groups: Groups,
    scaling: float,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """One LoRA layer on rows in groups, each group with its own factors.

    Args:
        x: (..., K), float32, float16 or bfloat16 (float64 on the torch backend).
        weight: (N, K), of x's dtype, any strides. bias: (N,) or None.
        A: (T, K, r). B: (T, r, N). float32 or of x's dtype, as `mix_inventories` returns them. Linearized, they are
            offsets from the point; at B0 = 0 A has no effect then and may be None.
        groups: which of the T factors every row takes, `Groups.of(task_ids, T, rows)`, for all layers of a forward.
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
        A0: (r, K), B0: (N, r): the linearization point. Neither: a plain layer. A0 alone: B0 = 0.
        dropout_p, seed: LoRA dropout of the low-rank branch by the mask of `lora_linear`, drawn, or made from `seed`, a
            0-d int64 tensor on x's device.

    Returns: (..., N), in the dtype of x (of autocast, where it is on).

    Formula, for a row of group t::

        plain        x Wᵀ + b + s (x A_t) B_t
        linearized   x Wᵀ + b + s [ (x A0ᵀ)(B0ᵀ + B_t) + (x A_t) B0ᵀ ]

    Raises ValueError for shapes, dtypes, devices or a number of rows that do not fit, BackendUnavailableError under
    `use_backend`.

    >>> import torch
    >>> groups = Groups.of(torch.tensor([1, 0]), n_groups=2, rows=2)
    >>> A, B = torch.ones(2, 3, 1), torch.tensor([[[1.0, 1.0]], [[5.0, 5.0]]])
    >>> grouped_lora_linear(torch.ones(2, 3), torch.zeros(2, 3), None, A, B, groups, 0.5).tolist()
    [[7.5, 7.5], [1.5, 1.5]]
    """
    x = autocast_input(x)
    problem = GroupedLoraLinear(x, weight, bias, A0, B0, A, B, groups, scaling, None, dropout_p, seed)
    return run(problem.check())


def run(problem: GroupedLoraLinear) -> Tensor:
    """The op of one stream for callers that have checked the problem; x is in its dtype."""
    if problem.at_zero:
        problem = problem._replace(d_shrink=None)
    if problem.groups.n_groups == 1:
        return lora_linear.run(problem.of_one_group())
    x, weight = problem.x, problem.weight
    if x.dim() != 2:
        problem = problem._replace(x=as_rows(x))
    backend = backends.select_op("routed_lora_linear", x, weight)
    problem = composed.with_dropout(backend, problem)
    if (
        transform_active()
        or intercepts(x)
        or torch.compiler.is_compiling()
        or composed.preferred(backend, x, weight, problem.rank, problem.dropout_p)
    ):
        y = by_groups(problem)
    else:
        y = _GroupedLoraLinear.apply(backend, *problem)
    return of_rows(y, x)


def run_two_streams(problem: GroupedLoraLinear, backend: ModuleType) -> tuple[Tensor, Tensor]:
    """(y, y_tangent) of model scope, of a checked problem."""
    problem = composed.with_dropout(backend, problem)
    x, x_tangent = problem.x, problem.x_tangent
    if x.dim() != 2 or problem.at_zero:
        problem = problem._replace(
            x=as_rows(x),
            x_tangent=None if x_tangent is None else as_rows(x_tangent),
            d_shrink=None if problem.at_zero else problem.d_shrink,
        )
    y, y_tangent = _GroupedLoraLinear.apply(backend, *problem)
    return of_rows(y, x), of_rows(y_tangent, x)


class _GroupedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: ModuleType, *fields: Any) -> Any:
        x, weight, bias, *factors, groups, scaling, _, dropout_p, seed, two_streams, _, _ = fields
        frozen: Any = (weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        problem = GroupedLoraLinear(*(x, *frozen, *factors, groups.layout(backend), *fields[8:]))
        result, needs = backend.grouped_lora_linear(problem), Fields(*ctx.needs_input_grad[1:])
        if two_streams:  # model scope: all but x and the groups' factors are frozen
            needs = Fields(needs.x, None, None, None, None, needs.d_shrink, needs.d_expand, None, None)
        low = result.c if problem.shrink is None else result.u
        ctx.save_for_backward(
            x if needs.weight or needs.d_shrink or needs.shrink else None,
            weight,
            *factors,
            seed,
            low if needs.d_expand else None,
            result.c if needs.expand else None,
        )
        ctx.backend, ctx.needs, ctx.options = backend, needs, (groups, scaling, dropout_p, two_streams)
        if not two_streams:
            return result.y
        ctx.mark_non_differentiable(result.y_tangent)
        ctx.set_materialize_grads(False)
        return result.y, result.y_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None = None) -> tuple[Any, ...]:
        if g is None:
            return (None,) * 16
        backend = backward_backend("grouped_lora_linear", ctx.backend, g)
        x, weight, *factors, seed, low, c = ctx.saved_tensors
        needs, (groups, scaling, dropout_p, two_streams) = ctx.needs, ctx.options
        layout = groups.layout(backend)
        fields: Any = (x, weight.to(g.dtype), None, *factors, layout, scaling, None, dropout_p, seed, two_streams)
        problem = GroupedLoraLinear(*fields)
        placed = backend.place(g, layout)
        dx, u_adjoint, c_adjoint = _low_adjoints(backend, problem, g, placed, needs)
        dA = dB = dA0 = dB0 = None
        if needs.d_shrink or needs.d_expand:
            p, wide = (low, placed) if needs.d_expand else (None, None)
            low_adjoint = c_adjoint if problem.expand is None else u_adjoint
            q, inputs = (low_adjoint, backend.place(x, layout, dropout_p, seed)) if needs.d_shrink else (None, None)
            B: Any = problem.d_expand
            dB, dA = backend.grouped_gradients(
                GroupedGradients(p, wide, q, inputs, layout, B.shape[0], scaling, B.dtype, dropout_p, seed)
            )
        if needs.shrink or needs.expand:
            assert problem.shrink is not None
            p, wide = (c, g) if needs.expand else (None, None)
            q, inputs = (c_adjoint, x) if needs.shrink else (None, None)
            dB0, dA0 = backend.factor_gradients(
                FactorGradients(p, wide, q, inputs, scaling, problem.shrink.dtype, dropout_p, seed)
            )
        d_weight, d_bias = g.t() @ x if needs.weight else None, g.sum(0) if needs.bias else None
        return None, dx, d_weight, d_bias, dA0, dB0, dA, dB, *(None,) * 8


def _low_adjoints(
    backend: ModuleType, problem: GroupedLoraLinear, g: Tensor, placed: Tensor, needs: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, ū, c̄), of which those that are needed; placed is g as the backend's blocks read it."""
    if problem.two_streams:
        if problem.expand is None:
            return (g @ problem.weight if needs.x else None), None, None
        if needs.x:
            y, _, u_adjoint, _ = backend.lora_linear(problem.primal().adjoint(g), save=bool(needs.d_shrink))
            return y, u_adjoint, None
        return None, g @ problem.expand.to(g.dtype) if needs.d_shrink else None, None
    adjoint = problem.adjoint(g, placed)
    if needs.x:
        y, _, u_adjoint, c_adjoint = backend.grouped_lora_linear(adjoint)
        return y, u_adjoint, c_adjoint
    return (None, *backend.grouped_shrink(adjoint)) if needs.d_shrink or needs.shrink else (None, None, None)
