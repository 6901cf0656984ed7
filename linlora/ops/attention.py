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

At model scope, where the tangent is a constant, the backward through o is all there is, and tangents are not kept.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora import reference
from linlora.kernels.attention_problem import Attention, AttentionResult
from linlora.ops import aten, backends
from linlora.ops.aten.attention import cast
from linlora.ops.aten.attention_adjoint import attention_dual_backward
from linlora.ops.checks import autocast_enabled, autocast_input
from linlora.ops.composed import backward_backend
from linlora.ops.transforms import transform_active


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
    problem = prepared(Attention(q, k, v, q_tangent, k_tangent, v_tangent, mask, causal, scale, dropout_p, seed))
    if transform_active():
        options = dict(zip(Attention._fields[6:], problem[6:], strict=True))
        return reference.attention(*problem[:6], **options)
    return run(problem)


def prepared(problem: Attention) -> Attention:
    """The checked problem in the dtype of autocast, with a scale."""
    problem.check()
    q, k, v = (autocast_input(x) for x in problem[:3])
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: one dtype is expected, got q {q.dtype}, k {k.dtype}, v {v.dtype}")
    q_tangent, k_tangent, v_tangent = (None if t is None else cast(t, q.dtype) for t in problem.tangents)
    scale = max(q.shape[-1], 1) ** -0.5 if problem.scale is None else problem.scale
    return Attention(
        q, k, v, q_tangent, k_tangent, v_tangent, problem.mask, problem.causal, scale, problem.dropout_p, problem.seed
    )


def run(problem: Attention, constant_tangent: bool = False) -> tuple[Tensor, Tensor]:
    """(o, o_tangent) of a prepared problem. `constant_tangent` is model scope: gradients of o alone, for q, k and v."""
    batch, heads, length, width = problem.q.shape
    backend = backends.select(problem.q.device, "attention", (length, width, batch * heads), problem.q.dtype)
    if 0 in (problem.q.numel(), problem.k.numel(), problem.v.numel()):
        backend = aten  # there is nothing to launch
    if torch.is_grad_enabled():
        outputs = _Attention.apply(backend, constant_tangent, *problem)
        o, o_tangent = outputs if problem.has_tangents else (outputs, None)
    else:
        o, o_tangent, _ = _computed(backend, problem)
    return o, torch.zeros_like(o) if o_tangent is None else o_tangent


def _computed(backend: ModuleType, problem: Attention) -> AttentionResult:
    """The result in its own precision: autocast has cast the inputs."""
    if not autocast_enabled(problem.q):
        return backend.attention(problem)
    with torch.autocast(problem.q.device.type, enabled=False):
        return backend.attention(problem)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: ModuleType, constant_tangent: bool, *fields: Any) -> Any:
        problem = Attention(*fields)
        result = _computed(backend, problem)
        kept = problem.primal() if constant_tangent else problem
        ctx.save_for_backward(*kept[:7], kept.seed, result.o, result.lse)
        ctx.backend, ctx.numbers = backend, problem[7:10]
        ctx.set_materialize_grads(False)
        if result.o_tangent is None:
            return result.o
        if constant_tangent:
            ctx.mark_non_differentiable(result.o_tangent)
        return result.o, result.o_tangent

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_tangent: Tensor | None = None) -> tuple[Any, ...]:
        backend = backward_backend("attention", ctx.backend, g, g_tangent)
        *tensors, seed, o, lse = ctx.saved_tensors
        problem = Attention(*(*tensors, *ctx.numbers, seed))
        gradients: tuple[Tensor | None, ...] = (None,) * 6
        if g_tangent is not None:
            gradients = attention_dual_backward(problem, g, g_tangent)
        elif g is not None:
            of_primals = backend.attention_backward(problem.primal(), g, AttentionResult(o, None, lse))
            gradients = (*of_primals, None, None, None)
        needed = zip(gradients, ctx.needs_input_grad[2:8], strict=True)
        return None, None, *(gradient if needs else None for gradient, needs in needed), *(None,) * 5
