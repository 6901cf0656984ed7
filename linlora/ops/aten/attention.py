"""Attention with tangents in blocks of queries, so that no S × S matrix exists.

    S = scale q kᵀ + mask          S_t = scale (q_t kᵀ + q k_tᵀ)
    P = softmax(S)                 o   = P v
    dP = P ⊙ (S_t − rowsum(P ⊙ S_t))                   the softmax's symmetric Jacobian, applied to S_t
    o_t = P v_t + dP v             = P v_t + (P ⊙ S_t) v − rowsum(P ⊙ S_t) ⊙ o

With dropout, P and dP meet the values through one mask. Backward recomputes P block by block.

Where PyTorch's own flash attention of the CPU serves (float32 and float64, no mask, no dropout), it computes o and, in
backward, the gradients; only the tangent is computed here, from P = exp(S − lse).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from linlora.ops.transforms import transform_active
from linlora.reference import keep_mask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_ROWS = 256
_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}  # of a block of S: in the cache of a CPU; enough to fill a GPU


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, o_t, lse) for q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), H a multiple of Hkv.

    `mask` broadcasts to (B, H, Sq, Sk): True where a query sees a key, or added to the scores. `causal` lets query i
    see the keys j <= i. A query that sees no key gets zeros. lse, logsumexp(S), is empty where backward needs none.
    """
    dtype, heads = q.dtype, q.shape[1]
    if _serves(q, v, mask, dropout_p):
        k, v = every_head(k, heads), every_head(v, heads)
        k_tangent, v_tangent = (x if x is None else every_head(x, heads) for x in (k_tangent, v_tangent))
        o, lse = _flash(q, k, v, 0.0, causal, scale=scale)
        return o, _tangent(q, k, v, q_tangent, k_tangent, v_tangent, lse, causal, scale), lse
    q, k, v, q_tangent, k_tangent, v_tangent = wide(q, k, v, q_tangent, k_tangent, v_tangent)
    q, k, v = (q * scale).contiguous(), every_head(k, heads), every_head(v, heads)
    q_tangent = None if q_tangent is None else (q_tangent * scale).contiguous()
    k_tangent = None if k_tangent is None else every_head(k_tangent, heads)
    v_tangent = None if v_tangent is None else every_head(v_tangent, heads)
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    tangents = q_tangent is not None or k_tangent is not None or v_tangent is not None
    o_tangent = torch.zeros_like(o) if tangents else q.new_empty(0)
    for rows, keys in blocks(q, k, causal):
        P = probabilities(q[rows], k[keys], mask, causal, rows)
        keep = kept_mask(P, rows, q.shape, dropout_p, seed)
        kept = times(P, keep).to(v.dtype)
        o[rows] = kept @ v[keys]
        if v_tangent is not None:
            o_tangent[rows] = kept @ v_tangent[keys]
        if q_tangent is not None or k_tangent is not None:
            S_tangent = product_tangent(q, q_tangent, k, k_tangent, rows, keys).to(P.dtype)
            P_tangent = torch.ops.aten._softmax_backward_data.default(S_tangent, P, -1, P.dtype)
            o_tangent[rows] += times(P_tangent, keep).to(v.dtype) @ v[keys]
    return o.to(dtype), o_tangent.to(dtype), q.new_empty(0)


def _serves(q: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Whether PyTorch's flash attention of the CPU computes the primal; it has no derivative of its own there."""
    plain = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and mask is None and dropout_p == 0.0
    return plain and q.shape[3] == v.shape[3] and q.numel() > 0 and v.numel() > 0 and not transform_active()


def _tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> Tensor:
    """o_t from lse, k and v with a head for each of q's; empty without tangents. Products add to one another."""
    if q_tangent is None and k_tangent is None and v_tangent is None:
        return q.new_empty(0)
    o_tangent = q.new_empty(*q.shape[:-1], v.shape[-1])
    q, lse = (q * scale).contiguous(), lse.to(q.dtype).unsqueeze(-1)
    q_tangent = None if q_tangent is None else (q_tangent * scale).contiguous()
    k_tangent, v_tangent = (x if x is None else x.contiguous() for x in (k_tangent, v_tangent))
    for rows, keys in blocks(q, k, causal):
        P = matrices(q[rows], k[keys].mT).sub_(lse[rows].flatten(0, 1)).exp_()
        if causal:
            P = P.tril_(rows[2].start) if P.shape[-1] > rows[2].start + 1 else P
        total = None if v_tangent is None else matrices(P, v_tangent[keys])
        S_tangent = None if q_tangent is None else matrices(q_tangent[rows], k[keys].mT)
        if k_tangent is not None:
            S_tangent = matrices(q[rows], k_tangent[keys].mT, S_tangent)
        if S_tangent is not None:
            P_tangent = torch.ops.aten._softmax_backward_data.default(S_tangent, P, -1, P.dtype)
            total = matrices(P_tangent, v[keys], total)
        o_tangent[rows] = total.view(o_tangent[rows].shape)  # type: ignore[union-attr]
    return o_tangent


def matrices(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """a b for each head of each example, added to `total` in place; one dimension of heads."""
    a, b = (x.flatten(0, 1) if x.dim() == 4 else x for x in (a, b))
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


def attention_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): dv = Pᵀ g, dS = P ⊙ (g vᵀ − rowsum(g ⊙ o)), dq = scale dS k, dk = scale dSᵀ q."""
    dtype, heads, kv_heads = q.dtype, q.shape[1], k.shape[1]
    if lse.numel() > 0 and _serves(q, v, mask, dropout_p):
        k, v = every_head(k, heads), every_head(v, heads)
        dq, dk, dv = _flash_backward(g, q, k, v, o, lse, 0.0, causal, scale=scale)
        return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)
    g, q, k, v = wide(g, q, k, v)
    q, g = (q * scale).contiguous(), g.contiguous()
    k, v = every_head(k, heads), every_head(v, heads)
    dq, dk, dv = (g.new_zeros(x.shape) for x in (q, k, v))
    for rows, keys in blocks(q, k, causal):
        P = probabilities(q[rows], k[keys], mask, causal, rows)
        keep = kept_mask(P, rows, q.shape, dropout_p, seed)
        dv[keys] += times(P, keep).to(g.dtype).mT @ g[rows]
        dP = times((g[rows] @ v[keys].mT).to(P.dtype), keep)
        dS = torch.ops.aten._softmax_backward_data.default(dP, P, -1, P.dtype).to(q.dtype)
        dq[rows] = dS @ k[keys]
        dk[keys] += dS.mT @ q[rows]
    return dq.mul_(scale).to(dtype), sum_groups(dk, kv_heads).to(dtype), sum_groups(dv, kv_heads).to(dtype)


def wide(*tensors: Tensor | None) -> list:
    """Half precision as float32 on a CPU, whose products would round S and P; a GPU's tensor cores keep theirs."""
    return [t if t is None or t.is_cuda else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def every_head(x: Tensor, heads: int) -> Tensor:
    """Grouped heads repeated for each of their queries, contiguous: O(S), like the input."""
    return x.contiguous() if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def sum_groups(dx: Tensor, kv_heads: int) -> Tensor:
    return dx if dx.shape[1] == kv_heads else dx.unflatten(1, (kv_heads, -1)).sum(2)


Block = tuple[slice, slice, slice]


def blocks(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[Block, Block]]:
    """Slices (batch, heads, rows) and (batch, heads, keys) of q and k, with at most _ELEMENTS scores, but at least a
    row. The keys that causality hides from every row of a block are left out."""
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    row_step = max(min(rows, _ROWS), 1)
    at_a_time = max(_ELEMENTS.get(q.device.type, 2**20) // max(row_step * keys, 1), 1)
    head_step, batch_step = min(at_a_time, max(heads, 1)), max(at_a_time // max(heads, 1), 1)
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            for r in range(0, rows, row_step):
                matrices = slice(b, min(b + batch_step, batch)), slice(h, min(h + head_step, heads))
                end = min(r + row_step, rows)
                yield (*matrices, slice(r, end)), (*matrices, slice(0, min(end, keys) if causal else keys))


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, rows: Block) -> Tensor:
    """softmax of a block of scores, in float32 or wider; zero in a row where every key is masked."""
    S = q @ k.mT
    S = S.to(torch.promote_types(S.dtype, torch.float32))
    if mask is not None:
        mask = _slice_mask(mask, rows)[..., : S.shape[-1]]
        S = S.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else S.add_(mask)
    if causal:
        row = torch.arange(rows[2].start, rows[2].stop, device=S.device)
        S = S.masked_fill_(torch.arange(S.shape[-1], device=S.device) > row.unsqueeze(1), -torch.inf)
    P = torch.softmax(S, -1)
    return P if mask is None or S.shape[-1] == 0 else P.masked_fill_(S.amax(-1, keepdim=True) == -torch.inf, 0.0)


def _slice_mask(mask: Tensor, rows: Block) -> Tensor:
    """The block's part of a mask that broadcasts: dimensions of size one stay."""
    mask = mask[(None,) * (4 - mask.dim())]
    return mask[tuple(s if size > 1 else slice(None) for s, size in zip(rows, mask.shape[:3], strict=True))]


def product_tangent(
    q: Tensor, q_tangent: Tensor | None, k: Tensor, k_tangent: Tensor | None, rows: Block, keys: Block
) -> Tensor:
    """q_t kᵀ + q k_tᵀ of a block, the scale being in q and q_t."""
    if q_tangent is None or k_tangent is None:
        return q[rows] @ k_tangent[keys].mT if k_tangent is not None else q_tangent[rows] @ k[keys].mT  # type: ignore[index]
    return (q_tangent[rows] @ k[keys].mT).add_(q[rows] @ k_tangent[keys].mT)


def kept_mask(P: Tensor, rows: Block, shape: torch.Size, p: float, seed: Tensor | None) -> Tensor | None:
    """mask / (1 − p) of a block: row (b H + h) Sq + i of the mask of the whole (B H Sq, Sk)."""
    if p == 0.0:
        return None
    _, heads, length, _ = shape
    masks = [
        keep_mask(P.shape[2], P.shape[3], p, seed, (b * heads + h) * length + rows[2].start)
        for b in range(rows[0].start, rows[0].stop)
        for h in range(rows[1].start, rows[1].stop)
    ]
    return torch.stack(masks).view(P.shape).to(P.dtype).mul_(1.0 / (1.0 - p))


def times(P: Tensor, keep: Tensor | None) -> Tensor:
    return P if keep is None else P * keep
