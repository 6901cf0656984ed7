"""`attention` on both streams of model scope: O(S) memory, six products of S × S tiles against two for plain attention.

    S = scale q kᵀ + mask          S_t = scale (q_t kᵀ + q k_tᵀ)
    P = softmax(S)                 o   = P v
    o_t = P v_t + (P ⊙ S_t) v − rowsum(P ⊙ S_t) ⊙ o

    dv = Pᵀ g     dS = P ⊙ (g vᵀ − rowsum(g ⊙ o))     dq = scale dS k     dk = scale dSᵀ q

With dropout one mask, a hash of its position, multiplies P and P ⊙ S_t where they meet the values (not in the row
sum). Kept for backward: q, k, v, o and what the backend keeps of the softmax, a number a row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops.attention import attention_backend, prepare
from linlora.ops.composed import backward_backend
from linlora.ops.dual.checks import check_constants


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None = None,
    k_tangent: Tensor | None = None,
    v_tangent: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, o_tangent), both (B, H, Sq, Dv); arguments as in `linlora.functional.attention`.

    Gradients reach q, k and v through o alone. Raises ValueError for what does not fit.
    """
    check_constants("attention", q_tangent=q_tangent, k_tangent=k_tangent, v_tangent=v_tangent)
    streams, scale = prepare(q, k, v, q_tangent, k_tangent, v_tangent, mask, scale, dropout_p, seed)
    backend = attention_backend(*streams[:3])
    o, o_tangent = _Attention.apply(*streams, mask, causal, scale, dropout_p, seed, backend)
    return o, torch.zeros_like(o) if o_tangent.shape != o.shape else o_tangent


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_tangent: Tensor | None,
        k_tangent: Tensor | None,
        v_tangent: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        o, o_tangent, lse = backend.attention(
            q, k, v, q_tangent, k_tangent, v_tangent, mask, causal, scale, dropout_p, seed
        )
        ctx.save_for_backward(q, k, v, o, lse, mask, seed)
        ctx.options, ctx.backend = (causal, scale, dropout_p), backend
        ctx.mark_non_differentiable(o_tangent)
        return o, o_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        backend = backward_backend("attention", ctx.backend, g)
        q, k, v, o, lse, mask, seed = ctx.saved_tensors
        causal, scale, dropout_p = ctx.options
        dq, dk, dv = backend.attention_backward(g, q, k, v, o, lse, mask, causal, scale, dropout_p, seed)
        return dq, dk, dv, *(None,) * 9
