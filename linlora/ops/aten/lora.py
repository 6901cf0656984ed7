"""The LoRA layer of the `torch` backend, one composition for two uses.

In an autograd Function it computes in place. With gradients recorded, and under a transform, every call is a
differentiable one: then it is the layer by itself, on the problem of any backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.kernels.problem import FactorGradients, Gradients, LoraLinear, Result
from linlora.ops.transforms import transform_active
from linlora.reference import keep_mask

_MASK_ROWS = 128  # rows of the mask made at a time: they stay in the L2 cache (8.0 -> 2.4 ms at 2048x1024, 2 cores)
_REDUCTION_BLOCKS = 8


def lora_linear(problem: LoraLinear, save: bool = True, primal: bool = True) -> Result:
    """The result of one stream or two, of matrices. Two streams have u and c without `save` too."""
    problem = in_one_dtype(problem)
    x, weight, two = problem.x, problem.weight, problem.two_streams
    if not (save or two) and problem.dropout_p == 0.0 and folding_pays(x, weight):
        return Result(linear(x, _folded(problem), problem.bias))
    u, c = low_rank(problem)
    if not two:
        y = _updated(linear(x, weight, problem.bias), problem, u, problem.d_expand, c)
        return Result(y, None, u, c) if save else Result(y)
    primal_y = _updated(linear(x, weight, problem.bias), problem, u, problem.expand, None) if primal else None
    x_tangent = problem.x_tangent
    y_tangent = x.new_zeros(x.shape[0], weight.shape[0]) if x_tangent is None else linear(x_tangent, weight)
    return Result(primal_y, _updated(y_tangent, problem, u, problem.d_expand, c), u, c)


def low_rank(problem: LoraLinear, with_c: bool = True) -> tuple[Tensor, Tensor | None]:
    """u and c, the products of rank r, of factors in the dtype of x. In the short form u alone, and not `with_c`."""
    low, low_tangent, shrink, d_shrink = problem.x, problem.x_tangent, problem.shrink, problem.d_shrink
    if problem.dropout_p > 0.0 and not problem.masks_update:
        low = dropout(low, problem.dropout_p, problem.seed)
        low_tangent = None if low_tangent is None else dropout(low_tangent, problem.dropout_p, problem.seed)
    u = linear(low, shrink)
    if d_shrink is None or not with_c:
        return u, None
    if not problem.two_streams:
        return u, torch.addmm(u, low, d_shrink.t())
    c = linear(low, d_shrink)
    return u, c if low_tangent is None else torch.addmm(c, low_tangent, shrink.t())


def folding_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether x (W + ΔW)ᵀ beats adding a low-rank update to x Wᵀ, when u and c are not wanted.

    Forming W + ΔW takes 2r NK FLOPs, the update 2r M(N + K). It is worth a transient buffer of W's size where that is
    at most a third of x and y together, on a CPU (a GPU would rather not write it), and exact enough from fp32 on.
    """
    n, k = weight.shape
    return not x.is_cuda and x.dtype in (torch.float32, torch.float64) and x.shape[0] * (n + k) >= 3 * n * k


def _folded(problem: LoraLinear) -> Tensor:
    """W + s [ (E0 + dE) S0 + E0 dS ] of one stream."""
    folded = _add_product(problem.weight, problem.d_expand, problem.shrink, problem.scaling)
    if problem.expand is None or problem.d_shrink is None:
        return folded
    return _add_product(folded, problem.expand, problem.shrink + problem.d_shrink, problem.scaling)


def _add_product(weight: Tensor, expand: Tensor, shrink: Tensor, scaling: float) -> Tensor:
    """weight + s expand shrink, in weight's own layout: Wᵀ is not transposed in memory for it."""
    if weight.stride(0) < weight.stride(1):
        return torch.addmm(weight.t(), shrink.t(), expand.t(), alpha=scaling).t()
    return torch.addmm(weight, expand, shrink, alpha=scaling)


def _updated(y: Tensor, problem: LoraLinear, u: Tensor, of_u: Tensor | None, c: Tensor | None) -> Tensor:
    """y + s [ u of_uᵀ + c E0ᵀ ], masked in an adjoint with dropout; without `of_u` or c their term is left out.

    In place, unless somebody differentiates these calls.
    """
    masked = problem.masks_update and problem.dropout_p > 0.0
    update = torch.zeros_like(y) if masked else y
    if torch.is_grad_enabled() or transform_active():
        if of_u is not None:
            update = torch.addmm(update, u, of_u.t(), alpha=problem.scaling)
        if c is not None and problem.expand is not None:
            update = torch.addmm(update, c, problem.expand.t(), alpha=problem.scaling)
        return y + dropout(update, problem.dropout_p, problem.seed) if masked else update
    if of_u is not None:
        update.addmm_(u, of_u.t(), alpha=problem.scaling)
    if c is not None and problem.expand is not None:
        update.addmm_(c, problem.expand.t(), alpha=problem.scaling)
    return y.add_(dropout(update, problem.dropout_p, problem.seed)) if masked else y


def factor_gradients(problem: FactorGradients) -> Gradients:
    """The two skinny products of a backward."""
    p, g, q, x, scaling, dtype, dropout_p, seed = problem
    return Gradients(
        None if p is None or g is None else _reduce_rows(p, g).t().to(dtype) * scaling,
        None if q is None or x is None else _reduce_rows(q, dropout(x, dropout_p, seed)).to(dtype) * scaling,
    )


def _reduce_rows(low: Tensor, wide: Tensor) -> Tensor:
    """lowᵀ wide (r, columns), a long sum over rows. A CPU's matrix product does not share such a sum between threads:
    in independent blocks it takes 0.8 instead of 1.2 ms (2048x16 by 2048x1024, 2 cores)."""
    rows = low.shape[0]
    if low.is_cuda or rows < 64 * _REDUCTION_BLOCKS or rows % _REDUCTION_BLOCKS:
        return low.t() @ wide
    blocks = (_REDUCTION_BLOCKS, rows // _REDUCTION_BLOCKS, -1)
    return torch.bmm(low.reshape(blocks).transpose(1, 2), wide.reshape(blocks)).sum(0)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x ⊙ mask / (1 − p) for a matrix x, with the mask of `linlora.reference.keep_mask` made block by block."""
    if p == 0.0:
        return x
    rows, columns = x.shape
    step = rows if x.is_cuda or torch.compiler.is_compiling() else _MASK_ROWS
    blocks = [
        x[first : first + step] * keep_mask(min(step, rows - first), columns, p, seed, first).to(x.dtype)
        for first in range(0, rows, max(step, 1))
    ]
    return torch.cat(blocks).mul_(1.0 / (1.0 - p)) if blocks else x


def in_one_dtype(problem: LoraLinear) -> LoraLinear:
    """The problem with its factors in the dtype of x."""
    dtype, (shrink, expand, d_shrink, d_expand) = problem.x.dtype, problem[3:7]
    if shrink.dtype == d_expand.dtype == dtype and (expand is None or expand.dtype == d_shrink.dtype == dtype):
        return problem
    return problem._replace(
        shrink=shrink.to(dtype),
        expand=None if expand is None else expand.to(dtype),
        d_shrink=None if d_shrink is None else d_shrink.to(dtype),
        d_expand=d_expand.to(dtype),
    )
