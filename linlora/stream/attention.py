"""Rules of attention: the fused op on both streams, for each of the forms in which PyTorch calls attention."""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen  # noqa: F401  it defines torch.ops.torch_attn

from linlora.ops import dual
from linlora.ops.packed_attention import by_sequence
from linlora.stream.arithmetic import tangent
from linlora.stream.caller import where
from linlora.stream.fallback import forward_mode
from linlora.stream.tensor import DualTensor, TangentError, bound, duals, primals, rule, wrap


@rule("scaled_dot_product_attention")
def attention(func: Any, args: tuple, kwargs: dict) -> Any:
    q, k, v, mask, dropout_p, causal, scale, grouped = bound(ATTENTION, args, kwargs)
    repeats = q.dim() > 2 and k.dim() > 2 and q.shape[-3] != k.shape[-3] and not grouped
    if isinstance(mask, DualTensor) or not fits(q, k, v) or repeats:
        return forward_mode(func, args, kwargs)
    stream = next(duals((q, k, v))).stream
    seed = torch.randint(2**31, (), device=q.device) if dropout_p > 0.0 else None
    tensors = [primals(x) for x in (q, k, v)] + [tangent(x) for x in (q, k, v)]
    if q.dim() == 3:  # (heads, length, size): one sample
        tensors = [x if x is None else x.unsqueeze(0) for x in tensors]
    outputs = dual.attention(*tensors, mask=mask, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed)
    o, o_tangent = (o.reshape(*q.shape[:-1], v.shape[-1]) for o in outputs)
    return wrap(o, o_tangent, stream)


ATTENTION: dict[str, Any] = {
    "query": ..., "key": ..., "value": ..., "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None,
    "enable_gqa": False,
}  # fmt: skip


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the op takes tensors of these shapes, which PyTorch broadcasts."""
    return q.dim() == k.dim() == v.dim() and q.dim() in (3, 4) and q.shape[:-3] == k.shape[:-3] == v.shape[:-3]


def composed(func: Any, args: tuple, kwargs: dict) -> Any:
    """The pieces of attention, each with a rule: for masks that train or carry a tangent, and shapes that broadcast."""
    q, k, v, mask, dropout_p, causal, scale, grouped = bound(ATTENTION, args, kwargs)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = (q * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)) @ k.mT
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        unseen = (scores == -math.inf).all(-1, keepdim=True)  # by a query that sees no key: zeros, as torch has it
        scores = scores.masked_fill(unseen, 0.0)
    probabilities = torch.softmax(scores, -1)
    if mask is not None:
        probabilities = probabilities.masked_fill(unseen, 0.0)
    return functional.dropout(probabilities, dropout_p) @ v


def packed(func: Any, args: tuple, kwargs: dict) -> Any:
    """torch.nn.attention.varlen.varlen_attn. Its logsumexp, which only it knows, is NaN here."""
    q, k, v, starts, of_keys, _, _, causal, scale, window, _, used, pages, _ = bound(_PACKED_ATTENTION, args, kwargs)
    left, right = window or (-1, -1)
    lengths = starts.diff().tolist()
    key_lengths = lengths if of_keys is None else of_keys.diff().tolist()
    causal = causal or right == 0
    paged = used is not None or pages is not None
    if left != -1 or right > 0 or paged or (causal and lengths != key_lengths):
        raise TangentError(
            f"{where(func)}: windows, pages of a cache and causal attention to more keys than queries have no tangent "
            "here; call scaled_dot_product_attention with a mask"
        )
    streams: Any = (*(primals(x) for x in (q, k, v)), *(tangent(x) for x in (q, k, v)))
    options = {"causal": causal, "scale": scale}
    o, o_tangent = by_sequence(dual.attention, streams, lengths, key_lengths, None, options)
    unknown = o.detach().new_full((o.shape[1], o.shape[0]), math.nan, dtype=torch.float32)
    return (
        wrap(o, o_tangent, next(duals((q, k, v))).stream),
        unknown,
        torch.zeros(2, dtype=torch.uint64, device=o.device),
    )


_PACKED_ATTENTION: dict[str, Any] = {
    **dict.fromkeys(("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"), ...), "is_causal": False,
    **dict.fromkeys(("scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits")),
}  # fmt: skip
_PACKED = torch.ops.torch_attn._varlen_attn.default
DualTensor.rules.update({_PACKED: packed, torch.ops.torch_attn._varlen_attn: packed})


@rule("multi_head_attention_forward")
def multi_head(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run nn.MultiheadAttention function by function; PyTorch hands it over as one."""
    return _OPENED(*args, **kwargs)


def _opened(function: Any) -> Any:
    """A function of torch.nn.functional that does not look for tensors with rules; what it calls does."""
    never = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never)
    opened = FunctionType(
        function.__code__, {**function.__globals__, **never}, function.__name__, function.__defaults__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def _never(*tensors: Tensor) -> bool:
    return False


_OPENED = _opened(functional.multi_head_attention_forward)
