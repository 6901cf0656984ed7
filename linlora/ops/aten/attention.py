"""Attention with tangents in blocks of queries, so that no S × S matrix exists.

    S = scale q kᵀ + mask          S_t = scale (q_t kᵀ + q k_tᵀ)
    P = softmax(S)                 o   = P v
    dP = P ⊙ (S_t − rowsum(P ⊙ S_t))                   the softmax's symmetric Jacobian, applied to S_t
    o_t = P v_t + dP v             = P v_t + (P ⊙ S_t) v − rowsum(P ⊙ S_t) ⊙ o

With dropout, P and dP meet the values through one mask. Backward recomputes P block by block.

Where PyTorch's own flash attention of the CPU serves (float32 and float64, no mask, no dropout), it computes the
gradients in backward and, without tangents, o; with them P is at hand here, and o one product more. On a GPU PyTorch's
fused attention does the same, and runs once more in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from linlora.kernels.attention_problem import Attention, AttentionResult
from linlora.ops.aten.dropout import on_gpu
from linlora.ops.transforms import transform_active
from linlora.reference import keep_mask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_HALF = (torch.float16, torch.bfloat16)
_ROWS = 256
_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}  # of a block of S: in the cache of a CPU; enough to fill a GPU


def attention(problem: Attention) -> AttentionResult:
    """o and, where an input has a tangent, o_t; lse, logsumexp(S), where a backward may ask for it."""
    dtype, serves = problem.q.dtype, _serves(problem)
    if serves and not problem.has_tangents:
        o, lse = _flash(*_adjacent(problem), 0.0, problem.causal, scale=problem.scale)
        return AttentionResult(o, None, lse)
    if not problem.has_tangents and _is_fused(problem):
        return AttentionResult(_fused(problem))
    keeps_lse = serves and any(x.requires_grad for x in problem[:3])
    problem = computed(problem)
    q, v = problem.q, problem.v
    batch, heads, length, _ = q.shape
    o = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # as networks flatten it, without a copy
    o_tangent = torch.empty_like(o) if problem.has_tangents else None
    lse = q.new_empty(q.shape[:-1]) if keeps_lse else None
    for rows, keys in blocks(problem):
        _fill(problem, AttentionResult(o, o_tangent, lse), rows, keys)
    return AttentionResult(cast(o, dtype), None if o_tangent is None else cast(o_tangent, dtype), lse)


def _fill(problem: Attention, result: AttentionResult, rows: Block, keys: Block) -> None:
    """A block of the result. Each of its tiles is freed before the next is made, which then lies in the cache."""
    v, v_tangent = problem.v, problem.v_tangent
    P, keep = probabilities(problem, rows, keys, result.lse), kept_mask(problem, rows, keys)
    kept = cast(times(P, keep), v.dtype)
    _write(rows.of(result.o), kept, keys.of(v))
    if result.o_tangent is None:
        return
    if v_tangent is not None:
        _write(rows.of(result.o_tangent), kept, keys.of(v_tangent))
    S_tangent = product_tangent(problem, rows, keys)
    if S_tangent is not None:
        dP = cast(times(jacobian(P, cast(S_tangent, P.dtype)), keep), v.dtype)
        _write(rows.of(result.o_tangent), dP, keys.of(v), beta=0 if v_tangent is None else 1)


def _serves(problem: Attention) -> bool:
    """Whether PyTorch's flash attention of the CPU computes the primal; it has no derivative of its own there."""
    q, v = problem.q, problem.v
    plain = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
    if not plain or problem.mask is not None or problem.dropout_p > 0.0:
        return False
    if problem.causal and problem.scale <= 0:
        return False  # it scales what causality has set to -inf
    return q.shape[3] == v.shape[3] and q.numel() > 0 and v.numel() > 0 and not transform_active()


def _is_fused(problem: Attention) -> bool:
    """Whether a GPU's fused attention computes the primal: it has no S × S there for these dtypes and head sizes."""
    q, v = problem.q, problem.v
    if not on_gpu(q) or q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or problem.scale <= 0:
        return False
    if problem.mask is not None or problem.dropout_p > 0.0 or q.shape[3] % 8 or v.shape[3] % 8:
        return False
    return q.numel() > 0 and v.numel() > 0 and not (transform_active() or torch.compiler.is_compiling())


def _fused(problem: Attention) -> Tensor:
    """o, differentiable."""
    q, k, v = _adjacent(problem)
    return scaled_dot_product_attention(q, k, v, is_causal=problem.causal, scale=problem.scale)


def _adjacent(problem: Attention) -> list[Tensor]:
    """q, k and v of every head, as fused attention reads them: it takes the numbers of a row for adjacent."""
    q, k, v = problem[:3]
    return [_rows(every_head(x, q.shape[1])) for x in (q, k, v)]


def _rows(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or (x.stride(3) == 1 and x.stride(2) >= x.shape[3]) else x.contiguous()


def _write(y: Tensor, a: Tensor, b: Tensor, beta: int = 0) -> None:
    """y = beta y + a b for each head of each example of a block: one example's are a batch of matrices, in any y."""
    if len(y) == 1:
        y[0].baddbmm_(a[0], b[0], beta=beta)
    elif beta:
        y += a @ b
    else:
        y.copy_(a @ b)


def scaled_product(a: Tensor, b: Tensor, scale: float, plus: Tensor | None = None) -> Tensor:
    """scale a b for each head of each example, added to `plus` in place."""
    y = a.new_empty(*a.shape[:-1], b.shape[-1]) if plus is None else plus
    y.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), beta=0 if plus is None else 1, alpha=scale)
    return y


def attention_backward(problem: Attention, g: Tensor, result: AttentionResult) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): dv = Pᵀ g, dS = P ⊙ (g vᵀ − rowsum(g ⊙ o)), dq = scale dS k, dk = scale dSᵀ q."""
    dtype, kv_heads, scale = problem.q.dtype, problem.k.shape[1], problem.scale
    if result.lse is not None and _serves(problem):
        streams = _rows(g), *_adjacent(problem), result.o, result.lse
        dq, dk, dv = _flash_backward(*streams, 0.0, problem.causal, scale=scale)
        return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)
    if _is_fused(problem):
        leaves = [x.detach().requires_grad_() for x in problem[:3]]
        with torch.enable_grad():
            o = _fused(problem._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
        return torch.autograd.grad(o, leaves, g)  # type: ignore[return-value]
    (g,) = wide(g)
    problem, g = computed(problem), g.contiguous()
    q, k, v = problem[:3]
    dq, dk, dv = (g.new_zeros(x.shape) for x in (q, k, v))
    for rows, keys in blocks(problem):
        P, keep = probabilities(problem, rows, keys), kept_mask(problem, rows, keys)
        keys.of(dv).add_(times(P, keep).to(g.dtype).mT @ rows.of(g))
        dP = times((rows.of(g) @ keys.of(v).mT).to(P.dtype), keep)
        dS = jacobian(P, dP).to(q.dtype)
        rows.of(dq).copy_(dS @ keys.of(k))
        keys.of(dk).add_(dS.mT @ rows.of(q))
    dq, dk = dq.mul_(scale), dk.mul_(scale)
    return dq.to(dtype), sum_groups(dk, kv_heads).to(dtype), sum_groups(dv, kv_heads).to(dtype)


def computed(problem: Attention) -> Attention:
    """The problem as it is computed: wide, in strides that products read, a key head a head."""
    heads = problem.q.shape[1]
    streams: list[Any] = [x if x is None else _rows(every_head(x, heads)) for x in wide(*problem[:6])]
    q, k, v, q_tangent, k_tangent, v_tangent = streams
    return Attention(q, k, v, q_tangent, k_tangent, v_tangent, *problem[6:])


def wide(*tensors: Tensor | None) -> list:
    """Half precision as float32 on a CPU, whose products would round S and P; a GPU's tensor cores keep theirs."""
    return [t.float() if t is not None and t.dtype in _HALF and not t.is_cuda else t for t in tensors]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype; where it has it, at the price of a comparison."""
    return x if x.dtype == dtype else x.to(dtype)


def every_head(x: Tensor, heads: int) -> Tensor:
    """Grouped heads repeated for each of their queries: O(S), like the input."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def sum_groups(dx: Tensor, kv_heads: int) -> Tensor:
    return dx if dx.shape[1] == kv_heads else dx.unflatten(1, (kv_heads, -1)).sum(2)


class Block(NamedTuple):
    """A part of tensors (B, H, S, ...) that is computed at once."""

    examples: slice
    heads: slice
    places: slice
    is_whole: bool  # small calls are one block, and slicing costs more than computing there

    def of(self, x: Tensor) -> Tensor:
        """The block of a tensor."""
        return x if self.is_whole else x[self[:3]]


def blocks(problem: Attention) -> Iterator[tuple[Block, Block]]:
    """Blocks of q and of k, with at most _ELEMENTS scores, but at least a row. The keys that causality hides from every
    row of a block are left out."""
    batch, heads, rows, _ = problem.q.shape
    keys = problem.k.shape[2]
    row_step = max(min(rows, _ROWS), 1)
    at_a_time = max(_ELEMENTS.get(problem.q.device.type, 2**20) // max(row_step * keys, 1), 1)
    head_step, batch_step = min(at_a_time, max(heads, 1)), max(at_a_time // max(heads, 1), 1)
    has_all_rows = batch_step >= batch and head_step >= heads and row_step >= rows
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            for r in range(0, rows, row_step):
                matrices = slice(b, min(b + batch_step, batch)), slice(h, min(h + head_step, heads))
                end = min(r + row_step, rows)
                seen = min(end, keys) if problem.causal else keys
                yield (
                    Block(*matrices, slice(r, end), has_all_rows),
                    Block(*matrices, slice(0, seen), has_all_rows and seen == keys),
                )


def scores(problem: Attention, rows: Block, keys: Block) -> Tensor:
    """S of a block, in float32 or wider; -inf where a query does not see a key."""
    S, mask = scaled_product(rows.of(problem.q), keys.of(problem.k).mT, problem.scale), problem.mask
    S = cast(S, torch.promote_types(S.dtype, torch.float32))
    if mask is not None:
        mask = _slice_mask(mask, rows)[..., : S.shape[-1]]
        S = S.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else S.add_(mask)
    if problem.causal:
        hidden = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu_(rows.places.start + 1)
        S = S.masked_fill_(hidden, -torch.inf)
    return S


def softmax(problem: Attention, S: Tensor) -> Tensor:
    """P of the scores of a block; zero in a row where every key is masked."""
    P = torch.softmax(S, -1)
    if problem.mask is None or S.shape[-1] == 0:
        return P
    return P.masked_fill_(S.amax(-1, keepdim=True) == -torch.inf, 0.0)


def probabilities(problem: Attention, rows: Block, keys: Block, lse: Tensor | None = None) -> Tensor:
    """P of a block, and its rows of logsumexp(S) in `lse`."""
    S = scores(problem, rows, keys)
    P = softmax(problem, S)
    if lse is not None:
        torch.sub(S.amax(-1), P.amax(-1).log_(), out=rows.of(lse))
    return P


def jacobian(P: Tensor, S: Tensor) -> Tensor:
    """P ⊙ (S − rowsum(P ⊙ S)): the softmax's derivative along S, and its transpose."""
    return torch.ops.aten._softmax_backward_data.default(S, P, -1, P.dtype)


def _slice_mask(mask: Tensor, rows: Block) -> Tensor:
    """The block's part of a mask that broadcasts: dimensions of size one stay."""
    mask = mask[(None,) * (4 - mask.dim())]
    return mask[tuple(s if size > 1 else slice(None) for s, size in zip(rows[:3], mask.shape[:3], strict=True))]


def product_tangent(problem: Attention, rows: Block, keys: Block) -> Tensor | None:
    """scale (q_t kᵀ + q k_tᵀ) of a block; None where neither has a tangent."""
    q, k, _, q_tangent, k_tangent = problem[:5]
    y = None if q_tangent is None else scaled_product(rows.of(q_tangent), keys.of(k).mT, problem.scale)
    return y if k_tangent is None else scaled_product(rows.of(q), keys.of(k_tangent).mT, problem.scale, plus=y)


def kept_mask(problem: Attention, rows: Block, keys: Block) -> Tensor | None:
    """mask / (1 − p) of a block in float32 or wider: row (b H + h) Sq + i of the mask of the whole (B H Sq, Sk)."""
    if problem.dropout_p == 0.0:
        return None
    _, heads, length, _ = problem.q.shape
    examples, of_heads = (torch.arange(n.start, n.stop, dtype=torch.int32) for n in rows[:2])
    starts = (examples[:, None] * heads + of_heads) * length + rows.places.start
    count, columns = rows.places.stop - rows.places.start, keys.places.stop
    keep = keep_mask(count, columns, problem.dropout_p, problem.seed, starts[..., None].to(problem.q.device))
    return keep.to(torch.promote_types(problem.q.dtype, torch.float32)).mul_(1.0 / (1.0 - problem.dropout_p))


def times(P: Tensor, keep: Tensor | None) -> Tensor:
    return P if keep is None else P * keep
