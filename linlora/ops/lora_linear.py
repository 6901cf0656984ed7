"""`lora_linear`: the primal and the tangent of one LoRA layer, two streams through one reading of W.

    forward    y    = x W ᵀ  + b + s u B0ᵀ                  u = x' A0ᵀ
               y_t  = x_t Wᵀ + s [ c B0ᵀ + u dBᵀ ]          c = x' dAᵀ + x_t' A0ᵀ

    backward   dx_t = g_t W + s ū A0                        ū = g_t B0
               dx   = g W   + s [ c̄ A0 + ū dA ]             c̄ = g_t dB + g B0

               d dB = s g_tᵀ u     d B0 = s [ gᵀ u + g_tᵀ c ]
               d dA = s ūᵀ x'      d A0 = s [ c̄ᵀ x' + ūᵀ x_t' ]

The backward of the op is the op of the transposes with the two streams swapped: (g_t, g) in, (dx_t, dx) out, one
kernel for both. With B0 = 0: y = x Wᵀ + b, y_t = x_t Wᵀ + s u dBᵀ; dx = g W + s ū A0 with ū = g_t dB.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops import backends, composed
from linlora.ops.checks import autocast_input, check_lora_linear, check_number
from linlora.ops.composed import backward_backend
from linlora.ops.linearized_lora_linear import factor_gradients
from linlora.ops.rows import as_rows
from linlora.ops.transforms import transform_active


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
    x = autocast_input(x)
    x_tangent = None if x_tangent is None else autocast_input(x_tangent)
    check_number("lora_linear", "scaling", scaling)
    check_lora_linear("lora_linear", x, weight, bias, A0, B0, dA, dB, x_tangent, dropout_p, seed)
    if B0 is None:
        dA = None
    arguments = (x, weight, bias, A0, B0, dA, dB, scaling, x_tangent, dropout_p, seed)
    if transform_active():
        return composed.lora_linear(*arguments)
    backend = backends.select_layer("lora_linear", x, weight, A0.shape[0], dropout_p)
    if composed.preferred(backend, x, weight, A0.shape[0], dropout_p):
        return composed.lora_linear(*arguments)
    return _LoraLinear.apply(*arguments, backend)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A0: Tensor,
        B0: Tensor | None,
        dA: Tensor | None,
        dB: Tensor,
        scaling: float,
        x_tangent: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        rows, rows_tangent = _rows(x), _rows(x_tangent)
        cast_bias = bias if bias is None else bias.to(x.dtype)
        y, y_tangent, u, c = backend.lora_linear(
            rows, rows_tangent, weight.to(x.dtype), cast_bias, A0, dA, B0, dB, scaling, dropout_p, seed
        )
        _, W_needs, _, A0_needs, B0_needs, dA_needs, dB_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if W_needs or A0_needs or dA_needs else None,
            x_tangent if W_needs or A0_needs else None,
            weight, A0, B0, dA, dB,
            u if dB_needs or B0_needs else None,
            c if B0_needs else None,
            seed,
        )  # fmt: skip
        ctx.scaling, ctx.dropout_p, ctx.backend, ctx.x_shape = scaling, dropout_p, backend, x.shape
        ctx.set_materialize_grads(False)
        shape = (*x.shape[:-1], weight.shape[0])
        return y.view(shape), y_tangent.view(shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_tangent: Tensor | None) -> tuple[Tensor | None, ...]:
        backend = backward_backend("lora_linear", ctx.backend, g, g_tangent)
        x, x_tangent, weight, A0, B0, dA, dB, u, c, seed = ctx.saved_tensors
        x_needs, W_needs, bias_needs, A0_needs, B0_needs, dA_needs, dB_needs, _, xt_needs, *_ = ctx.needs_input_grad
        g, g_tangent, x, x_tangent = _rows(g), _rows(g_tangent), _rows(x), _rows(x_tangent)
        dropout = (ctx.dropout_p, seed)
        dx = dx_tangent = d_A0 = d_B0 = d_dA = d_dB = None

        if g_tangent is not None:
            # One launch with the streams swapped: g_tangent is the primal of the adjoint, g its tangent.
            shrink, d_shrink = (dB.t(), None) if B0 is None else (B0.t(), dB.t())
            expand, d_expand = (None, A0.t()) if B0 is None else (A0.t(), dA.t())
            dx_tangent, dx, u_adjoint, c_adjoint = backend.lora_linear(
                g_tangent, g, weight.to(g_tangent.dtype).t(), None, shrink, d_shrink, expand, d_expand,
                ctx.scaling, *dropout, adjoint=True, primal=xt_needs,
            )  # fmt: skip
            A0_coefficients = u_adjoint if B0 is None else c_adjoint
            (d_dB, d_B0), (d_dA, d_A0) = factor_gradients(
                backend, g_tangent, x, (u if dB_needs else None, c),
                (u_adjoint if dA_needs else None, A0_coefficients if A0_needs else None),
                dB.dtype, ctx.scaling, *dropout,
            )  # fmt: skip
            if A0_needs and B0 is not None and x_tangent is not None:
                _, (d_A0_tangent,) = factor_gradients(
                    backend, g_tangent, x_tangent, (), (u_adjoint,), dB.dtype, ctx.scaling, *dropout
                )  # fmt: skip
                d_A0 = _sum(d_A0, d_A0_tangent)
        elif g is not None and B0 is not None:
            # Only the primal was used: plain LoRA at (A0, B0).
            dx, u_adjoint, _ = backend.linearized_lora_linear(
                g, weight.to(g.dtype).t(), None, B0.t(), None, None, A0.t(), ctx.scaling, *dropout, adjoint=True
            )
            _, (d_A0,) = factor_gradients(
                backend, g, x, (), (u_adjoint if A0_needs else None,), dB.dtype, ctx.scaling, *dropout
            )
        elif g is not None:
            dx = g @ weight.to(g.dtype)
        if B0_needs and g is not None:
            (d_B0_primal,), _ = factor_gradients(backend, g, None, (u,), (), dB.dtype, ctx.scaling, *dropout)
            d_B0 = _sum(d_B0, d_B0_primal)

        d_weight = _sum(_product(g, x), _product(g_tangent, x_tangent)) if W_needs else None
        d_bias = g.sum(0) if bias_needs and g is not None else None
        dx = dx.view(ctx.x_shape) if x_needs and dx is not None else None
        dx_tangent = dx_tangent.view(ctx.x_shape) if xt_needs and dx_tangent is not None else None
        return dx, d_weight, d_bias, d_A0, d_B0, d_dA, d_dB, None, dx_tangent, None, None, None


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def _product(g: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if g is None or x is None else g.t() @ x


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
