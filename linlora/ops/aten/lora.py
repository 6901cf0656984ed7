"""The LoRA layer of the `torch` backend, one composition for two uses.

As a backend it computes in place, in matrices. Where autograd records it, and under a transform, every call is a
differentiable one: then it is the layer by itself, on the problem of any backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.kernels.problem import FACTORS, PARAMETERS, FactorGradients, Gradients, LoraLinear, Result
from linlora.ops.aten.dropout import dropout, mask, on_gpu, with_mask
from linlora.ops.transforms import transform_active

_REDUCTION_BLOCKS = 8
Terms = tuple[tuple[Any, Tensor | None], ...]
"""The products of an update: rows (M, r), and a factor (N, r)."""


def lora_linear(problem: LoraLinear, save: bool = True, primal: bool = True, recorded: bool = False) -> Result:
    """The result of one stream or two, for matrices; where it is `recorded`, and under a transform, for x (..., K).

    A call folded into the weight makes no c: `c_of` does, where a gradient of S0 or E0 asks for it.
    """
    if problem.dropout_p > 0.0 and not problem.masks_update:
        problem = with_mask(problem)
    problem = problem.like_x(PARAMETERS)
    x, weight, bias = problem[:3]
    two, in_place = problem.two_streams, not (recorded or transform_active())
    folds = not (save and problem.masks_update)  # backward, beside y and dx, W + ΔW would be the peak
    if in_place and folds and not two and problem.dropout_p == 0.0 and folding_pays(x, weight):
        return Result(linear(x, _folded(problem), bias), None, linear(x, problem.shrink) if save else None)
    if problem.is_pair and in_place and _joining_pays(x, problem.rank):
        u, c, terms = _side_by_side(problem, save)
    else:
        u, c = low_rank(problem)
        terms = (u, problem.d_expand), (c, problem.expand)
    of_y = ((u, problem.expand),) if two else terms
    y = _updated(linear(x, weight, bias), of_y, problem, in_place) if primal or not two else None
    y_tangent = _updated(_frozen_tangent(problem), terms, problem, in_place) if two else None
    return Result(y, y_tangent, u, c) if save else Result(y, y_tangent)


def _frozen_tangent(problem: LoraLinear) -> Tensor:
    """x_t Wᵀ."""
    x, weight, x_tangent = problem.x, problem.weight, problem.x_tangent
    return x.new_zeros(*x.shape[:-1], weight.shape[0]) if x_tangent is None else linear(x_tangent, weight)


def _joining_pays(x: Tensor, rank: int) -> bool:
    """Whether laying factors side by side is less than the pass over x and y that it saves."""
    return on_gpu(x) or x.shape[0] >= 16 * rank


def _side_by_side(problem: LoraLinear, save: bool) -> tuple[Tensor, Tensor | None, Terms]:
    """u, c and the update of the pair form with [c u] and [E0 dE] as one: x is read and y written once, not twice.

    The adjoint has them the other way round, so that both find the factors as `kept_factors` has laid them out.
    """
    r, adjoint = problem.rank, problem.masks_update
    factors: Any = ((problem.shrink, problem.d_shrink), (problem.d_expand, problem.expand))
    ordered = factors if adjoint else [pair[::-1] for pair in factors]
    shrink, expand = (_joined(first, second, dim) for dim, (first, second) in enumerate(ordered))
    low, low_tangent = _low_inputs(problem)
    low = linear(low, shrink)
    u, c = (low[:, :r], low[:, r:]) if adjoint else (low[:, r:], low[:, :r])
    if not problem.two_streams:
        c.add_(u)
    elif low_tangent is not None:
        c.addmm_(low_tangent, problem.shrink.t())
    if save and not on_gpu(low):  # who keeps one of them does not hold both
        u, c = u.contiguous(), c.contiguous()
    return u, c, ((low, expand),)


def _joined(first: Any, second: Any, dim: int) -> Tensor:
    """Two matrices side by side: as they lie, where they lie so, which torch.compile does not trace."""
    shape = [a + b if i == dim else a for i, (a, b) in enumerate(zip(first.shape, second.shape, strict=True))]
    if (
        not torch.compiler.is_compiling()
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.stride() == second.stride()
        and second.storage_offset() == first.storage_offset() + first.shape[dim] * first.stride(dim)
    ):
        return first.as_strided(shape, first.stride())
    return torch.cat((first, second), dim)


def low_rank(problem: LoraLinear, with_c: bool = True) -> tuple[Tensor, Tensor | None]:
    """u and c, the products of rank r, of factors in the dtype of x. In the short form u alone, and not `with_c`."""
    shrink, d_shrink = problem.shrink, problem.d_shrink
    low, low_tangent = _low_inputs(problem)
    u = linear(low, shrink)
    if d_shrink is None or not with_c:
        return u, None
    if not problem.two_streams:
        return u, _added(u, low, d_shrink)
    c = linear(low, d_shrink)
    return u, c if low_tangent is None else _added(c, low_tangent, shrink)


def c_of(problem: LoraLinear, c: Tensor | None) -> Tensor | None:
    """The c of a result, or made where it was folded."""
    return low_rank(problem.like_x(FACTORS))[1] if c is None else c


def _low_inputs(problem: LoraLinear) -> tuple[Tensor, Tensor | None]:
    """x' and x_t'."""
    x, x_tangent, p, seed = problem.x, problem.x_tangent, problem.dropout_p, problem.seed
    if p == 0.0 or problem.masks_update:
        return x, x_tangent
    return dropout(x, p, seed), None if x_tangent is None else dropout(x_tangent, p, seed)


def folding_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x (W + ΔW)ᵀ beats adding a low-rank update to x Wᵀ, u wanted or not.

    Forming W + ΔW takes 2r NK FLOPs, the update 2r M(N + K). It is worth a transient buffer of W's size where that is
    at most a third of x and y together, on a CPU (a GPU would rather not write it), and exact enough from fp32 on.
    """
    n, k = weight.shape
    return x.is_cpu and x.shape[0] * (n + k) >= 3 * n * k and x.dtype in (torch.float32, torch.float64)


def _folded(problem: LoraLinear) -> Tensor:
    """W + s [ (E0 + dE) S0 + E0 dS ] of one stream, in one product: [dE E0] by [S0; S0 + dS]."""
    shrink, expand = problem.shrink, problem.d_expand
    if problem.expand is not None and problem.d_shrink is not None:
        shrink = torch.cat((shrink, shrink + problem.d_shrink))
        expand = torch.cat((expand, problem.expand), 1)
    return _add_product(problem.weight, expand, shrink, problem.scaling)


def _add_product(weight: Tensor, expand: Tensor, shrink: Tensor, scaling: float) -> Tensor:
    """weight + s expand shrink, in weight's own layout: Wᵀ is not transposed in memory for it."""
    if weight.stride(0) < weight.stride(1):
        return torch.addmm(weight.t(), shrink.t(), expand.t(), alpha=scaling).t()
    return torch.addmm(weight, expand, shrink, alpha=scaling)


def _updated(y: Tensor, terms: Terms, problem: LoraLinear, in_place: bool) -> Tensor:
    """y + s Σ low factorᵀ over the terms that have a factor, masked in an adjoint with dropout."""
    scaling, p = problem.scaling, problem.dropout_p
    masked = problem.masks_update and p > 0.0
    add = _add if in_place and not masked else _added
    update, beta = y, 0.0 if masked else 1.0
    for low, factor in terms:
        if factor is not None:
            update, beta = add(update, low, factor, scaling, beta), 1.0
    if not masked or beta == 0.0:
        return update
    if in_place:
        return y.addcmul_(update, mask(update, p, problem.seed), value=1.0 / (1.0 - p))
    return y + dropout(update, p, problem.seed)


def _add(y: Tensor, low: Tensor, factor: Tensor, scaling: float, beta: float) -> Tensor:
    """beta y + s low factorᵀ, of matrices, in place."""
    return y.addmm_(low, factor.t(), beta=beta, alpha=scaling)


def _added(y: Tensor, low: Tensor, factor: Tensor, scaling: float = 1.0, beta: float = 1.0) -> Tensor:
    """beta y + s low factorᵀ, in one call for matrices; where rows have leading dimensions beta is 1."""
    if y.dim() == 2:
        return torch.addmm(y, low, factor.t(), beta=beta, alpha=scaling)
    return torch.add(y, linear(low, factor), alpha=scaling)


def factor_gradients(problem: FactorGradients) -> Gradients:
    """The two skinny products of a backward."""
    p, g, q, x, scaling, dtype, dropout_p, seed = problem
    return Gradients(
        None if p is None or g is None else _reduce_rows(p, g, scaling).t().to(dtype),
        None if q is None or x is None else _reduce_rows(q, dropout(x, dropout_p, seed), scaling).to(dtype),
    )


def _reduce_rows(low: Tensor, wide: Tensor, scaling: float) -> Tensor:
    """s lowᵀ wide (r, columns), a long sum over rows. A CPU's matrix product does not share such a sum between threads:
    in independent blocks it takes 0.8 instead of 1.2 ms (2048x16 by 2048x1024, 2 cores)."""
    rows = low.shape[0]
    if on_gpu(low) or rows < 64 * _REDUCTION_BLOCKS or rows % _REDUCTION_BLOCKS:
        return torch.addmm(low.new_empty(()), low.t(), wide, beta=0.0, alpha=scaling)
    blocks = (_REDUCTION_BLOCKS, rows // _REDUCTION_BLOCKS, -1)
    return torch.bmm(low.reshape(blocks).transpose(1, 2), wide.reshape(blocks)).sum(0).mul_(scaling)


def kept_factors(problem: LoraLinear) -> LoraLinear:
    """The problem with its factors as forward and backward read them: in the dtype of x, and in the pair form on a GPU
    side by side, in the buffers [dS; S0] and [E0 dE]."""
    _, _, _, shrink, expand, d_shrink, d_expand, *_ = problem
    if expand is None or d_shrink is None or not on_gpu(problem.x):
        return problem.like_x(FACTORS)
    dtype, r = problem.x.dtype, problem.rank
    shrinks, expands = torch.cat((d_shrink, shrink)).to(dtype), torch.cat((expand, d_expand), 1).to(dtype)
    return problem._replace(shrink=shrinks[r:], d_shrink=shrinks[:r], expand=expands[:, :r], d_expand=expands[:, r:])
