"""`linearized_lora_linear`: primal + tangent of one LoRA layer in one launch (layer scope).

    forward    y  = x Wᵀ + b + s [ c B0ᵀ + u dBᵀ ]      u  = x' A0ᵀ     c  = x' (A0 + dA)ᵀ
    backward   dx = g W      + s [ c̄ A0  + ū dA  ]      ū  = g B0       c̄  = g (B0 + dB)

               d dB = s gᵀ u    d B0 = s gᵀ c    d dA = s ūᵀ x'    d A0 = s c̄ᵀ x'

The backward of the op is the op of the transposes: one kernel serves both. With B0 = 0 both lines lose a term:
y = x Wᵀ + b + s u dBᵀ, and dx = g W + s ū A0 with ū = g dB.

Saved for backward: u (M, r), c only if B0 asks for a gradient, x only if dA, A0 or W does, the factors, no copy of W.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops import backends, composed
from linlora.ops.checks import autocast_input, check_lora_linear, check_number
from linlora.ops.composed import backward_backend
from linlora.ops.rows import as_rows
from linlora.ops.transforms import transform_active


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
    x = autocast_input(x)
    check_number("linearized_lora_linear", "scaling", scaling)
    check_lora_linear("linearized_lora_linear", x, weight, bias, A0, B0, dA, dB, None, dropout_p, seed)
    return unchecked(x, weight, bias, A0, B0, dA, dB, scaling, dropout_p, seed)


def unchecked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The op for callers that check its arguments once for all calls (linlora.layers.lora_linear); x has its dtype."""
    if B0 is None:
        dA = None
    arguments = (x, weight, bias, A0, B0, dA, dB, scaling, dropout_p, seed)
    if transform_active():
        return composed.linearized_lora_linear(*arguments)
    backend = backends.select_layer("linearized_lora_linear", x, weight, A0.shape[0], dropout_p)
    if composed.preferred(backend, x, weight, A0.shape[0], dropout_p):
        return composed.linearized_lora_linear(*arguments)
    if not torch.is_grad_enabled():
        return _forward(*arguments, backend, save=False)[0]
    return _LinearizedLoraLinear.apply(*arguments, backend)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: ModuleType,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = as_rows(x)
    bias = bias if bias is None else bias.to(x.dtype)
    y, u, c = backend.linearized_lora_linear(
        rows, weight.to(x.dtype), bias, A0, dA, B0, dB, scaling, dropout_p, seed, save=save
    )
    return y.view(*x.shape[:-1], weight.shape[0]), u, c


class _LinearizedLoraLinear(torch.autograd.Function):
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
        dropout_p: float,
        seed: Tensor | None,
        backend: ModuleType,
    ) -> Tensor:
        _, W_needs, _, A0_needs, B0_needs, dA_needs, dB_needs, *_ = ctx.needs_input_grad
        y, u, c = _forward(
            x, weight, bias, A0, B0, dA, dB, scaling, dropout_p, seed, backend, save=dB_needs or B0_needs
        )  # fmt: skip
        ctx.save_for_backward(
            x if W_needs or A0_needs or dA_needs else None,
            weight, A0, B0, dA, dB,
            u if dB_needs else None,
            c if B0_needs else None,
            seed,
        )  # fmt: skip
        ctx.scaling, ctx.dropout_p, ctx.backend, ctx.x_shape = scaling, dropout_p, backend, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        backend = backward_backend("linearized_lora_linear", ctx.backend, g)
        x, weight, A0, B0, dA, dB, u, c, seed = ctx.saved_tensors
        x_needs, W_needs, bias_needs, A0_needs, _, dA_needs, *_ = ctx.needs_input_grad
        g = as_rows(g)
        rows = None if x is None else as_rows(x)

        dx = u_adjoint = c_adjoint = None
        if x_needs:
            shrink, d_shrink = (dB.t(), None) if B0 is None else (B0.t(), dB.t())
            expand, d_expand = (None, A0.t()) if B0 is None else (A0.t(), dA.t())
            dx, u_adjoint, c_adjoint = backend.linearized_lora_linear(
                g, weight.to(g.dtype).t(), None, shrink, d_shrink, expand, d_expand,
                ctx.scaling, ctx.dropout_p, seed, adjoint=True, save=A0_needs or dA_needs,
            )  # fmt: skip
            dx = dx.view(ctx.x_shape)
        elif A0_needs or dA_needs:
            u_adjoint = g @ (dB if B0 is None else B0).to(g.dtype)
            c_adjoint = torch.addmm(u_adjoint, g, dB.to(g.dtype)) if B0 is not None and A0_needs else None

        A0_coefficients = u_adjoint if B0 is None else c_adjoint
        (d_dB, d_B0), (d_dA, d_A0) = factor_gradients(
            backend, g, rows, (u, c), (u_adjoint if dA_needs else None, A0_coefficients if A0_needs else None),
            dB.dtype, ctx.scaling, ctx.dropout_p, seed,
        )  # fmt: skip
        d_weight = g.t() @ rows if W_needs and rows is not None else None
        d_bias = g.sum(0) if bias_needs else None
        return dx, d_weight, d_bias, d_A0, d_B0, d_dA, d_dB, None, None, None, None


def factor_gradients(
    backend: ModuleType,
    g: Tensor,
    x: Tensor | None,
    g_coefficients: tuple[Tensor | None, ...],
    x_coefficients: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """s gᵀ p for every p of `g_coefficients` and s qᵀ x' for every q of `x_coefficients`, in one reading of g and x.

    The coefficients are (M, r) or None; None gives None.
    """
    ps = [p for p in g_coefficients if p is not None]
    qs = [q for q in x_coefficients if q is not None]
    if not ps and not qs:
        return [None] * len(g_coefficients), [None] * len(x_coefficients)
    wide, tall = backend.factor_gradients(
        _columns(ps), g if ps else None, _columns(qs), x if qs else None, scaling, dtype, dropout_p, seed
    )
    expands = iter(wide.split([p.shape[1] for p in ps], dim=1) if ps else ())
    shrinks = iter(tall.split([q.shape[1] for q in qs], dim=0) if qs else ())
    return (
        [None if p is None else next(expands) for p in g_coefficients],
        [None if q is None else next(shrinks) for q in x_coefficients],
    )


def _columns(blocks: list[Tensor]) -> Tensor | None:
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)) if blocks else None
