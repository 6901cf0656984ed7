"""`grouped_lora_linear`: a LoRA layer with factors of its own for every group of rows.

    forward    y  = x Wᵀ + b + s [ c B0ᵀ + u B_t ]      u = x' A0ᵀ      c = u + x' A_t
    backward   dx = g W      + s [ c̄ A0  + ū A_tᵀ ]     ū = g B0        c̄ = ū + g B_tᵀ

               dB_t = s uᵀ g     dA_t = s x'ᵀ ū          sums over the rows of group t
               dB0  = s gᵀ c     dA0  = s c̄ᵀ x'          sums over all rows

The backward of the op is the op of the transposes. What the point (A0, B0) leaves out:

    plain routing     y = x Wᵀ + b + s c B_t,  c = x' A_t      dx = g W + s c̄ A_tᵀ,  c̄ = g B_tᵀ
    B0 = 0            y = x Wᵀ + b + s u B_t,  u = x' A0ᵀ      dx = g W + s c̄ A0,    c̄ = g B_tᵀ

Saved for backward: the u or c that B_t multiplies (M, r), x if A_t, A0 or W trains, the factors, no copy of W.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.kernels.problem import FactorGradients, LoraLinear
from linlora.ops import aten, backends, composed, lora_linear
from linlora.ops.checks import autocast_input, check_number
from linlora.ops.composed import backward_backend
from linlora.ops.grouping import Groups
from linlora.ops.mixing import by_groups
from linlora.ops.routing_checks import check_grouped_lora_linear
from linlora.ops.rows import as_rows
from linlora.ops.transforms import transform_active


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
        dropout_p, seed: LoRA dropout of the low-rank branch by the mask of `lora_linear`, made from `seed`, a 0-d
            int64 tensor on x's device.

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
    check_number("grouped_lora_linear", "scaling", scaling)
    check_grouped_lora_linear(
        x, weight, bias, A, B, groups, A0, B0, None, dropout_p, seed
    )  # fmt: skip
    return unchecked(x, weight, bias, A, B, groups, scaling, A0, B0, dropout_p, seed)


def unchecked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    groups: Groups,
    scaling: float,
    A0: Tensor | None,
    B0: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The op for callers that have checked its arguments; x is in its dtype."""
    if A0 is not None and B0 is None:
        A = None
    if groups.n_groups == 1:
        return _one_adapter(x, weight, bias, A, B, scaling, A0, B0, dropout_p, seed)
    rows = as_rows(x)
    backend = backends.select(x.device, "routed_lora_linear")
    if (
        transform_active()
        or torch.compiler.is_compiling()
        or composed.preferred(backend, x, weight, B.shape[1], dropout_p)
    ):
        y = by_groups(rows, weight, bias, A, B, groups.layout(aten), scaling, A0, B0, dropout_p, seed)
    else:
        y = _GroupedLoraLinear.apply(rows, weight, bias, A, B, A0, B0, scaling, groups, dropout_p, seed, backend)
    return y.view(*x.shape[:-1], weight.shape[0])


def _one_adapter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    scaling: float,
    A0: Tensor | None,
    B0: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """A single group is a single adapter: the op without groups. Plain LoRA is its short form with A for A0."""
    B = B[0].t()
    if A0 is None:
        assert A is not None
        A0, A = A[0].t(), None
    dA = None if A is None else A[0].t()
    return lora_linear.run(LoraLinear(x, weight, bias, A0, B0, dA, B, scaling, None, dropout_p, seed))


class _GroupedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        scaling: float,
        groups: Groups,
        dropout_p: float,
        seed: Tensor | None,
        backend: ModuleType,
    ) -> Tensor:
        layout = groups.layout(backend)
        bias = bias if bias is None else bias.to(x.dtype)
        y, u, c = backend.grouped_lora_linear(
            x, backend.place(x, layout, dropout_p, seed), weight.to(x.dtype), bias,
            _transposed(A0), A, _transposed(B0), B, layout, scaling, dropout_p, seed,
        )  # fmt: skip
        _, W_needs, _, A_needs, B_needs, A0_needs, B0_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if W_needs or A_needs or A0_needs else None,
            weight, A, B, A0, B0,
            (c if A0 is None else u) if B_needs else None,
            c if B0_needs else None,
            seed,
        )  # fmt: skip
        ctx.scaling, ctx.groups, ctx.dropout_p, ctx.backend = scaling, groups, dropout_p, backend
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        backend = backward_backend("grouped_lora_linear", ctx.backend, g)
        x, weight, A, B, A0, B0, low, c, seed = ctx.saved_tensors
        x_needs, W_needs, bias_needs, A_needs, B_needs, A0_needs, B0_needs, *_ = ctx.needs_input_grad
        scaling, layout = ctx.scaling, ctx.groups.layout(backend)
        dx = dA = dB = dA0 = dB0 = low_adjoint = c_adjoint = None
        placed_g = backend.place(g, layout)
        roles = (B0, B.mT, A0, None if A is None else A.mT)
        if x_needs:
            dx, u_adjoint, c_adjoint = backend.grouped_lora_linear(
                g, placed_g, weight.to(g.dtype).t(), None, *roles, layout, scaling, ctx.dropout_p, seed, adjoint=True
            )
        elif A_needs or A0_needs:
            u_adjoint, c_adjoint = backend.grouped_shrink(placed_g, *roles[:2], layout)
        if A_needs:
            low_adjoint = c_adjoint if B0 is None else u_adjoint
        if A_needs or B_needs:
            d_expand, d_shrink = backend.grouped_gradients(
                low if B_needs else None, placed_g if B_needs else None,
                low_adjoint, backend.place(x, layout, ctx.dropout_p, seed) if A_needs else None,
                layout, B.shape[0], scaling, B.dtype, ctx.dropout_p, seed,
            )  # fmt: skip
            dA, dB = d_shrink if A_needs else None, d_expand if B_needs else None
        if A0_needs or B0_needs:
            dB0, dA0 = backend.factor_gradients(
                FactorGradients(
                    c if B0_needs else None, g if B0_needs else None,
                    c_adjoint if A0_needs else None, x if A0_needs else None,
                    scaling, A0.dtype, ctx.dropout_p, seed,
                )
            )  # fmt: skip
        dW = g.t() @ x if W_needs else None
        d_bias = g.sum(0) if bias_needs else None
        return dx, dW, d_bias, dA, dB, dA0, dB0, None, None, None, None, None


def _transposed(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.t()
