"""`attention` on both streams: O(S) memory, six products of S × S tiles against two for plain attention.

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

from linlora import backends
from linlora.ops.checks import autocast_input
from linlora.ops.transforms import refuse_double_backward


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
    """softmax(scale q kᵀ + mask) v and its tangent, as a differentiable op that never forms an S × S tensor.

    Args:
        q: (B, H, Sq, D), float32, float16 or bfloat16 (float64 on the torch backend), any strides.
        k, v: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), H a multiple of Hkv (grouped queries).
        q_tangent, k_tangent, v_tangent: like q, k, v, or None where an input has no tangent.
        mask: broadcastable to (B, H, Sq, Sk); bool, True where a query sees a key, or added to the scores. It takes
            no gradient.
        causal: query i sees the keys j <= i only.
        scale: 1 / sqrt(D) if None.
        dropout_p, seed: dropout of the probabilities, one mask for both streams; seed a 0-d int64 tensor.

    Returns: (o, o_tangent), both (B, H, Sq, Dv). Gradients reach q, k and v through o alone; o_tangent is a constant.
        A query that sees no key gets zeros.

    Raises ValueError for shapes, dtypes or a mask that do not fit.

    >>> import torch
    >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.eye(2).view(1, 1, 2, 2)
    >>> o, o_tangent = attention(q, k, v, v_tangent=torch.ones(1, 1, 2, 2))
    >>> o.flatten().tolist(), o_tangent.flatten().tolist()
    ([0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0])
    """
    q, k, v = autocast_input(q), autocast_input(k), autocast_input(v)
    tangents = [None if t is None else t.to(q.dtype) for t in (q_tangent, k_tangent, v_tangent)]
    _check(q, k, v, tangents, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = backends.select(q.device, "attention")
    o, o_tangent = _Attention.apply(q, k, v, *tangents, mask, causal, scale, dropout_p, seed, backend)
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
        refuse_double_backward("attention")
        q, k, v, o, lse, mask, seed = ctx.saved_tensors
        causal, scale, dropout_p = ctx.options
        dq, dk, dv = ctx.backend.attention_backward(g, q, k, v, o, lse, mask, causal, scale, dropout_p, seed)
        return dq, dk, dv, *(None,) * 9


def _check(q: Tensor, k: Tensor, v: Tensor, tangents: list[Tensor | None], mask: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"attention: (batch, heads, length, head size) is expected, got {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: these do not fit together: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: the heads of q are a multiple of those of k and v, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: one dtype is expected, got q {q.dtype}, k {k.dtype}, v {v.dtype}")
    for name, x, tangent in zip("qkv", (q, k, v), tangents, strict=True):
        if tangent is not None and tangent.shape != x.shape:
            raise ValueError(f"attention: {name}_tangent is {tuple(tangent.shape)}, {name} is {tuple(x.shape)}")
    if mask is None:
        return
    scores = (*q.shape[:3], k.shape[2])
    if mask.dim() > 4 or any(m not in (1, s) for m, s in zip(reversed(mask.shape), reversed(scores), strict=False)):
        raise ValueError(f"attention: mask {tuple(mask.shape)} does not broadcast to the scores {scores}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("attention: the mask asks for a gradient, which this op does not give; freeze what makes it")
