"""`routed_lora_linear`: a LoRA layer whose factors are mixed from an inventory of skills, for every row by its task.

    forward    y  = x Wᵀ + b + s u E       u = x S             S, E of the row's group, mixed once a group
    backward   dx = g W      + s ū Sᵀ      ū = g Eᵀ            dE = s uᵀ g     dS = s xᵀ ū     sums over a group's rows

              plain                linearized at (A0, B0)      at B0 = 0
    S         A_z                  [A0ᵀ, dA_z]                 A0ᵀ
    E         B_z                  [B0ᵀ + dB_z; B0ᵀ]           dB_z

Mixing is ordinary autograd around this Function: dw and the gradients of the inventory follow from the mixed factors'
own, one "unmix" product a layer. Saved for backward: u (M, r or 2r), x if A or W trains, the mixed factors.

Where many tasks share few rows, and wherever the host should not look at the ids, the skills' activations are mixed
instead of their factors (`linlora.ops.mixing.by_activations`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora import backends
from linlora.ops import aten, composed
from linlora.ops.checks import autocast_input
from linlora.ops.mixing import by_activations, mix_factors
from linlora.ops.routing_checks import check_routed_lora_linear, check_task_ids
from linlora.ops.transforms import refuse_double_backward, transform_active


def routed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    mixture: Tensor,
    scaling: float,
    task_ids: Tensor | None = None,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
) -> Tensor:
    """One LoRA layer on rows of mixed tasks, each task with its own mixture of S skills in Q heads.

    Args:
        x: (..., K), float32, float16 or bfloat16 (float64 on the torch backend).
        weight: (N, K), of x's dtype, any strides. bias: (N,) or None.
        A: (Q, S, K/Q, r). B: (Q, S, r, N/Q). float32 or of x's dtype; Q divides K and N. Linearized, they are the
            skills' offsets from the point; at B0 = 0 A has no effect then and may be None.
        mixture: (T, Q, S), the weights of T tasks; without task_ids (leading dimensions of x, Q, S): the weights
            themselves, per example or per token, or one mixture (Q, S) for all rows.
        scaling: alpha / r; PEFT's Poly has 1 / r.
        task_ids: integers below T, shaped like x's leading dimensions or the first of them: (batch,) gives every
            example its task, (batch, length) every token. Tasks may come in any order, and some not at all.
        A0: (r, K), B0: (N, r): the linearization point. Neither: plain routing. A0 alone: B0 = 0.

    Returns: (..., N), in the dtype of x (of autocast, where it is on).

    Formula (arXiv 2211.03831, A and B mixed separately, head q on the q-th blocks of inputs and outputs)::

        A_z = Σ_s w_qs A_qs      B_z = Σ_s w_qs B_qs
        plain        x Wᵀ + b + s (x A_z) B_z
        linearized   x Wᵀ + b + s [ (x A0ᵀ)(B0ᵀ + B_z) + (x A_z) B0ᵀ ]

    Raises ValueError for shapes, dtypes, devices or task ids that do not fit (task ids on a GPU are asserted on the
    device, without waiting for it), BackendUnavailableError for a backend that has no such op.

    >>> import torch
    >>> x, W = torch.ones(3, 2), torch.zeros(2, 2)
    >>> A, B = torch.ones(1, 2, 2, 1), torch.tensor([1.0, 10.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    >>> mixture = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    >>> routed_lora_linear(x, W, None, A, B, mixture, 0.5, torch.tensor([0, 1, 0])).tolist()
    [[1.0, 1.0], [5.5, 5.5], [1.0, 1.0]]
    """
    x = autocast_input(x)
    check_routed_lora_linear(x, weight, bias, A, B, mixture, task_ids, A0, B0)
    if task_ids is None:
        mixture = mixture.reshape(-1, *mixture.shape[-2:])
        task_ids = torch.arange(mixture.shape[0], device=x.device)
    else:
        task_ids = task_ids.reshape(-1).long()
        check_task_ids(task_ids, mixture.shape[0])
    if A0 is not None and B0 is None:
        A = None
    rows = x.reshape(-1, x.shape[-1])
    y = _routed(rows, weight, bias, A, B, mixture, scaling, task_ids, A0, B0)
    return y.view(*x.shape[:-1], weight.shape[0])


def _routed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    mixture: Tensor,
    scaling: float,
    task_ids: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
) -> Tensor:
    """The op on a matrix x (M, K), with task_ids (E,) of M / E rows each: which of its forms runs."""
    backend = backends.select(x.device, "routed_lora_linear")
    if not hasattr(backend, "grouped_lora_linear"):
        raise backends.BackendUnavailableError(
            "routed_lora_linear has no kernel in the backend that was asked for: use 'torch' for it"
        )
    repeats = x.shape[0] // max(task_ids.shape[0], 1)
    groups = None
    if not _static(backend, x, weight):
        groups = backend.group_rows(task_ids, repeats)
        if backend is aten and not aten.grouping_pays(groups, x.shape[0], min(mixture.shape[0], mixture.shape[2])):
            groups = None
    if groups is None:
        every_row = task_ids.unsqueeze(1).expand(-1, repeats).reshape(-1)
        return by_activations(x, weight, bias, A, B, mixture, scaling, every_row, A0, B0)
    mixed_A, mixed_B = mix_factors(A, B, mixture.index_select(0, groups.tasks))
    return _GroupedLoraLinear.apply(x, weight, bias, mixed_A, mixed_B, A0, B0, scaling, groups, backend)


def _static(backend: ModuleType, x: Tensor, weight: Tensor) -> bool:
    """Whether the call runs composed: under a transform or torch.compile, on no rows or few (`composed.SMALL`), and
    on a GPU without a grouped kernel, where the sizes of groups are not known on the host."""
    if transform_active() or torch.compiler.is_compiling() or x.shape[0] == 0:
        return True
    return backend is aten and (x.device.type != "cpu" or composed.preferred(backend, x, weight, 0.0))


class _GroupedLoraLinear(torch.autograd.Function):
    """The layer with factors A (U, K, r), B (U, r, N) a group, or offsets from a point A0 (r, K), B0 (N, r)."""

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
        groups: Any,
        backend: ModuleType,
    ) -> Tensor:
        down, up = _stack(A, B, A0, B0, x.dtype)
        bias = bias if bias is None else bias.to(x.dtype)
        y, u = backend.grouped_lora_linear(groups.gather(x), weight.to(x.dtype), bias, down, up, groups, scaling)
        _, W_needs, _, A_needs, B_needs, A0_needs, B0_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if W_needs or A_needs or A0_needs else None,
            weight, down, up,
            u if B_needs or B0_needs else None,
        )  # fmt: skip
        ctx.dtypes = [None if factor is None else factor.dtype for factor in (A, B, A0, B0)]
        ctx.rank, ctx.scaling, ctx.groups, ctx.backend = B.shape[1], scaling, groups, backend
        return groups.scatter(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("routed_lora_linear")
        x, weight, down, up, u = ctx.saved_tensors
        x_needs, W_needs, bias_needs, A_needs, B_needs, A0_needs, B0_needs, *_ = ctx.needs_input_grad
        rank, scaling, groups, backend = ctx.rank, ctx.scaling, ctx.groups, ctx.backend
        A_dtype, B_dtype, A0_dtype, B0_dtype = ctx.dtypes
        dx = dW = dA = dB = dA0 = dB0 = u_adjoint = None
        ordered = groups.gather(g)
        if x_needs:
            dx, u_adjoint = backend.grouped_lora_linear(
                ordered, weight.to(g.dtype).t(), None, up.mT, down.mT, groups, scaling
            )
            dx = groups.scatter(dx)
        elif A_needs or A0_needs:
            u_adjoint = backend.grouped_shrink(ordered, up.mT, groups)
        rows = groups.gather(x) if A_needs or A0_needs else None
        # Of a stacked pair, A0 owns the first columns of u and of its adjoint, the offsets A the last.
        if A_needs and u_adjoint is not None:
            dA = backend.grouped_reduce(u_adjoint[:, -rank:], rows, groups, scaling).mT.to(A_dtype)
        if A0_needs and u_adjoint is not None:
            dA0 = backend.grouped_reduce(u_adjoint[:, :rank], rows, groups, scaling).sum(0).to(A0_dtype)
        if B_needs:
            dB = backend.grouped_reduce(u[:, :rank], ordered, groups, scaling).to(B_dtype)
        if B0_needs:
            low = u[:, :rank] + u[:, rank:]
            dB0 = backend.grouped_reduce(low, ordered, groups, scaling).sum(0).t().to(B0_dtype)
        if W_needs:
            dW = g.t() @ x
        d_bias = g.sum(0) if bias_needs else None
        return dx, dW, d_bias, dA, dB, dA0, dB0, None, None, None


def _stack(
    A: Tensor | None, B: Tensor, A0: Tensor | None, B0: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The factors (U, K, r or 2r) and (U, r or 2r, N) that the layer multiplies with: the table above."""
    if A0 is None:
        assert A is not None
        return A.to(dtype), B.to(dtype)
    groups = B.shape[0]
    down = A0.t().expand(groups, -1, -1)
    if A is None or B0 is None:
        return down.to(dtype), B.to(dtype)
    point = B0.t().expand(groups, -1, -1)
    return torch.cat((down, A), 2).to(dtype), torch.cat((point + B, point), 1).to(dtype)
