"""The gradient of attention through both of its outputs, o and o_t, in blocks of queries like the forward.

The tangent is the derivative of o along the inputs' tangents, so the gradients in those are the backward of o alone
with the cotangent g_t of o_t; and the gradients in the inputs are the derivative of that backward, along the inputs'
tangents and with g as the tangent of g_t. (The streams are swapped, as in `lora_linear`.)

    dv   = Pᵀ g_t                       dv_t ↦ P_tᵀ g_t + Pᵀ g
    R    = g_t vᵀ                       R_t  = g vᵀ + g_t v_tᵀ
    dS   = P ⊙ (R − rowsum(P ⊙ R))      dS_t = P ⊙ (R_t − rowsum(P ⊙ R_t)) + P_t ⊙ (R − rowsum(P ⊙ R))
                                               − P ⊙ rowsum(P_t ⊙ R)
    dq   = scale dS k                   dq_t ↦ scale (dS_t k + dS k_t)
    dk   = scale dSᵀ q                  dk_t ↦ scale (dS_tᵀ q + dSᵀ q_t)

The left column are the gradients in q_t, k_t and v_t, the right one those in q, k and v. With dropout one mask falls on
P and P_t where they meet g and g_t, and on R and R_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linlora.kernels.attention_problem import Attention
from linlora.ops.aten.attention import (
    blocks,
    computed,
    jacobian,
    kept_mask,
    probabilities,
    product_tangent,
    sum_groups,
    times,
    wide,
)


def attention_dual_backward(
    problem: Attention, g: Tensor | None, g_tangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients in q, k, v and in q_tangent, k_tangent, v_tangent."""
    dtype, kv_heads = problem.q.dtype, problem.k.shape[1]
    g, g_tangent = wide(g, g_tangent)
    problem = computed(problem)
    q, k, v, q_tangent, k_tangent, v_tangent = problem[:6]
    of_primals = [g_tangent.new_zeros(x.shape) for x in (q, k, v)]
    of_tangents = [g_tangent.new_zeros(x.shape) for x in (q, k, v)]
    (dq, dk, dv), (dq_tangent, dk_tangent, dv_tangent) = of_primals, of_tangents
    for rows, keys in blocks(problem):
        P, keep = probabilities(problem, rows, keys), kept_mask(problem, rows, keys)
        R = times((rows.of(g_tangent) @ keys.of(v).mT).to(P.dtype), keep)
        dS, kept = jacobian(P, R), times(P, keep).to(v.dtype)
        keys.of(dv_tangent).add_(kept.mT @ rows.of(g_tangent))
        rows.of(dq_tangent).copy_(dS.to(q.dtype) @ keys.of(k))
        keys.of(dk_tangent).add_(dS.to(q.dtype).mT @ rows.of(q))
        dS_tangent = torch.zeros_like(dS)
        if g is not None:
            keys.of(dv).add_(kept.mT @ rows.of(g))
            dS_tangent += jacobian(P, times((rows.of(g) @ keys.of(v).mT).to(P.dtype), keep))
        if v_tangent is not None:
            dS_tangent += jacobian(P, times((rows.of(g_tangent) @ keys.of(v_tangent).mT).to(P.dtype), keep))
        S_tangent = product_tangent(problem, rows, keys)
        if S_tangent is not None:
            P_tangent = jacobian(P, S_tangent.to(P.dtype))
            keys.of(dv).add_(times(P_tangent, keep).to(v.dtype).mT @ rows.of(g_tangent))
            dS_tangent += P_tangent * (R - (P * R).sum(-1, keepdim=True)) - P * (P_tangent * R).sum(-1, keepdim=True)
        dS, dS_tangent = dS.to(q.dtype), dS_tangent.to(q.dtype)
        rows.of(dq).copy_(dS_tangent @ keys.of(k))
        keys.of(dk).add_(dS_tangent.mT @ rows.of(q))
        if k_tangent is not None:
            rows.of(dq).add_(dS @ keys.of(k_tangent))
        if q_tangent is not None:
            keys.of(dk).add_(dS.mT @ rows.of(q_tangent))
    gradients = [
        (problem.scale * of_q, problem.scale * sum_groups(of_k, kv_heads), sum_groups(of_v, kv_heads))
        for of_q, of_k, of_v in (of_primals, of_tangents)
    ]
    return tuple(x.to(dtype) for stream in gradients for x in stream)  # type: ignore[return-value]
