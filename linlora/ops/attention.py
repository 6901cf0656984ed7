"""`attention` with tangents: o and o_t of softmax attention, and the exact gradient through both of them.

    S = scale q kᵀ + mask          S_t = scale (q_t kᵀ + q k_tᵀ)
    P = softmax(S)                 o   = P v
    o_t = P v_t + (P ⊙ S_t) v − rowsum(P ⊙ S_t) ⊙ o

    through o alone      dv = Pᵀ g     dS = P ⊙ (g vᵀ − rowsum(g ⊙ o))     dq = scale dS k     dk = scale dSᵀ q
    through o_t too      the derivative of these along the tangents: `linlora.ops.aten.attention_adjoint`

Forward, and backward through o alone, are one launch each: six products of S × S tiles and five, in O(S) memory. The
backward through o_t is composed of aten calls on every backend, block by block, in O(S) memory too. With dropout one
mask, a hash of its position, multiplies P and P ⊙ S_t where they meet the values (not in the row sum). Kept for
backward: the inputs, o and what the backend keeps of the softmax, a number a row.

Model scope, where the tangent is a constant, keeps and computes less: `linlora.ops.dual.attention`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora import reference
from linlora.kernels.problem import DTYPES
from linlora.ops import aten, backends
from linlora.ops.aten.attention_adjoint import attention_dual_backward
from linlora.ops.checks import autocast_input, check_dropout, check_number
from linlora.ops.composed import backward_backend
from linlora.ops.transforms import transform_active

Streams = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


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

    Returns: (o, o_tangent), both (B, H, Sq, Dv). A query that sees no key gets zeros.

    Gradients are exact through both outputs and reach q, k, v and their tangents. Those of o_tangent are composed of
    aten calls on every backend; where it has no part in the loss nothing is computed for it. Under a torch.func
    transform or a dual level the whole op is composed of aten calls, and S × S tensors exist.

    Raises ValueError for shapes, dtypes or a mask that do not fit.

    >>> import torch
    >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.eye(2).view(1, 1, 2, 2)
    >>> o, o_tangent = attention(q, k, v, v_tangent=torch.ones(1, 1, 2, 2))
    >>> o.flatten().tolist(), o_tangent.flatten().tolist()
    ([0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0])
    """
    streams, scale = prepare(q, k, v, q_tangent, k_tangent, v_tangent, mask, scale, dropout_p, seed)
    if transform_active():
        return reference.attention(*streams, mask=mask, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed)
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
        streams = (q, k, v, q_tangent, k_tangent, v_tangent)
        o, o_tangent, lse = backend.attention(*streams, mask, causal, scale, dropout_p, seed)
        ctx.save_for_backward(*streams, o, lse, mask, seed)
        ctx.options, ctx.backend = (causal, scale, dropout_p), backend
        ctx.set_materialize_grads(False)
        return o, o_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_tangent: Tensor | None) -> tuple[Tensor | None, ...]:
        backend = backward_backend("attention", ctx.backend, g, g_tangent)
        q, k, v, q_tangent, k_tangent, v_tangent, o, lse, mask, seed = ctx.saved_tensors
        options = (mask, *ctx.options, seed)
        gradients: tuple[Tensor | None, ...] = (None,) * 6
        if g_tangent is not None and g_tangent.shape == o.shape:
            gradients = attention_dual_backward(g, g_tangent, q, k, v, q_tangent, k_tangent, v_tangent, *options)
        elif g is not None:
            gradients = (*backend.attention_backward(g, q, k, v, o, lse, *options), None, None, None)
        needed = zip(gradients, ctx.needs_input_grad[:6], strict=True)
        return *(gradient if needs else None for gradient, needs in needed), *(None,) * 6


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Streams, float]:
    """The checked inputs in the dtype of autocast, and the scale."""
    check_number("attention", "scale", 1.0 if scale is None else scale)
    check_dropout("attention", dropout_p, seed)
    _check_placed(q, k, v, q_tangent, k_tangent, v_tangent, mask)
    q, k, v = autocast_input(q), autocast_input(k), autocast_input(v)
    tangents = [None if t is None else t.to(q.dtype) for t in (q_tangent, k_tangent, v_tangent)]
    _check(q, k, v, tangents, mask)
    return (q, k, v, *tangents), max(q.shape[-1], 1) ** -0.5 if scale is None else scale  # type: ignore[return-value]


def attention_backend(q: Tensor, k: Tensor, v: Tensor) -> ModuleType:
    """The backend that runs the op: `torch` where an input is empty, for there is nothing to launch."""
    backend = backends.select(q.device, "attention")
    return aten if 0 in (q.numel(), k.numel(), v.numel()) else backend


def _check_placed(q: Tensor, *others: Tensor | None) -> None:
    """Raise a ValueError for integers and other dtypes, which softmax would round, and for tensors of two devices."""
    floats = "float32, float16, bfloat16 (or float64 on the torch backend)"
    for name, tensor in zip(("q", "k", "v", "q_tangent", "k_tangent", "v_tangent"), (q, *others[:5]), strict=True):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"attention: {name} is {tensor.dtype}: use {floats}")
    mask = others[5]
    if mask is not None and mask.dtype not in (torch.bool, *DTYPES):
        raise ValueError(
            f"attention: the mask is {mask.dtype}: use bool, True where a query sees a key, or scores to add, {floats}"
        )
    names = ("k", "v", "q_tangent", "k_tangent", "v_tangent", "the mask")
    for name, tensor in zip(names, others, strict=True):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"attention: {name} is on {tensor.device}, q on {q.device}: move the model or the input")


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
