"""`packed_attention`: attention with tangents over packed sequences of different lengths, without padding.

Each sequence is a call of `linlora.ops.attention`, on slices that copy nothing, so no pair of sequences is scored and
nothing is formed of the size of the longest; on a GPU this costs a launch a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from linlora.ops.attention import attention

Streams = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None = None,
    k_tangent: Tensor | None = None,
    v_tangent: Tensor | None = None,
    *,
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within each of several sequences that lie packed in one dimension, and its tangent.

    Args:
        q: (T, H, D), the queries of all sequences, in the layout of flash attention's `varlen`.
        k, v: (Tk, Hkv, D) and (Tk, Hkv, Dv), H a multiple of Hkv.
        q_tangent, k_tangent, v_tangent: like q, k, v, or None.
        lengths: how many queries each sequence has, integers of Python; T in all.
        key_lengths: how many keys; `lengths` if None.
        causal, scale, dropout_p: as in `linlora.functional.attention`; the mask of sequence i is drawn from seed + i.

    Returns: (o, o_tangent), both (T, H, Dv), with the gradients of `attention`. A sequence without keys gets zeros.

    Raises ValueError where the lengths do not add up, and what `attention` raises.

    >>> import torch
    >>> q, k, v = torch.randn(3, 5, 2, 8)
    >>> o, o_tangent = packed_attention(q, k, v, v_tangent=torch.ones_like(v), lengths=[2, 3])
    >>> alone, _ = attention(*(x[2:].transpose(0, 1)[None] for x in (q, k, v)))
    >>> torch.allclose(o[2:], alone[0].transpose(0, 1), atol=1e-5), o_tangent.round().unique().tolist()
    (True, [1.0])
    """
    options = {"causal": causal, "scale": scale, "dropout_p": dropout_p}
    return by_sequence(attention, (q, k, v, q_tangent, k_tangent, v_tangent), lengths, key_lengths, seed, options)


def by_sequence(
    op: Callable[..., tuple[Tensor, Tensor]],
    streams: Streams,
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None,
    seed: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(o, o_tangent) of an attention op, called on each sequence of packed streams (q, k, v and their tangents)."""
    key_lengths = lengths if key_lengths is None else key_lengths
    _check(streams, lengths, key_lengths)
    outputs, row, key = [], 0, 0
    for n, (rows, keys) in enumerate(zip(lengths, key_lengths, strict=True)):
        places = [slice(row, row + rows)] + [slice(key, key + keys)] * 2
        pieces = [
            None if x is None else x[place].transpose(0, 1).unsqueeze(0)
            for x, place in zip(streams, places * 2, strict=True)
        ]
        o, o_tangent = op(*pieces, seed=None if seed is None else seed + n, **options)
        outputs.append((o[0].transpose(0, 1), o_tangent[0].transpose(0, 1)))
        row, key = row + rows, key + keys
    if not outputs:
        empty = streams[0].new_empty(0, streams[0].shape[1], streams[2].shape[2])
        return empty, empty
    o, o_tangent = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return o, o_tangent


def _check(streams: Streams, lengths: Sequence[int], key_lengths: Sequence[int]) -> None:
    q, k, v, *tangents = streams
    if any(x is not None and x.dim() != 3 for x in streams):
        raise ValueError(
            "packed_attention: (tokens of all sequences, heads, head size) is expected, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if len(lengths) != len(key_lengths) or any(n < 0 for n in (*lengths, *key_lengths)):
        raise ValueError(f"packed_attention: lengths {list(lengths)} and {list(key_lengths)} do not fit together")
    for name, x, tangent, given in zip("qkv", (q, k, v), tangents, (lengths, key_lengths, key_lengths), strict=True):
        if tangent is not None and tangent.shape != x.shape:
            raise ValueError(f"packed_attention: {name}_tangent is {tuple(tangent.shape)}, {name} {tuple(x.shape)}")
        if sum(given) != x.shape[0]:
            raise ValueError(f"packed_attention: lengths add up to {sum(given)}, but {name} has {x.shape[0]} tokens")
