"""Finds the magnitude above which the largest values lie, of values that come in pieces: exactly, in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

_BUCKETS = 2**15


def cut_below(pieces: Callable[[], Iterable[Mapping[int, Tensor]]], count: int, keep: float) -> list[float]:
    """The number that the k largest magnitudes of a stream exceed, for each stream; k = ⌊keep · d⌋ and at least 1.

    Positive floating-point numbers are ordered as their bits are. The first pass counts values by their leading 16
    bits, which are sign, exponent and the start of the mantissa; the second sorts those of the one bucket that holds
    the k-th. Infinity for a stream without values. Raises ValueError where a value is NaN or infinity.

    Args:
        pieces: of some of the streams, by number; flat, float32 or float64, of one dtype a stream. Called once for each
            pass.
        count: of streams.
        keep: the part of the d values of a stream that are kept.

    >>> cuts = cut_below(lambda: [{0: torch.tensor([1.0, -5.0])}, {0: torch.tensor([3.0]), 2: torch.ones(2)}], 3, 0.7)
    >>> [round(cut, 6) for cut in cuts], cuts[0] < 3.0
    ([3.0, inf, 1.0], True)
    """
    counts = torch.zeros(count, _BUCKETS, dtype=torch.int64)
    infinite = [_BUCKETS] * count
    for piece in pieces():
        for stream, values in piece.items():
            infinite[stream] = int(_buckets(torch.full((1,), torch.inf, dtype=values.dtype)))
            counts[stream] += torch.bincount(_buckets(values), minlength=_BUCKETS)
    if any(of_stream[first:].any() for of_stream, first in zip(counts, infinite, strict=True)):
        raise ValueError("ties: a vector holds NaN or infinity; the run that trained it diverged")
    chosen, ranks = [], []
    for of_stream in counts:
        kept = max(1, int(keep * int(of_stream.sum())))
        from_above = of_stream.flip(0).cumsum(0)
        chosen.append(_BUCKETS - 1 - int(torch.searchsorted(from_above, kept)))
        ranks.append(int(from_above[_BUCKETS - 1 - max(0, chosen[-1])]) - kept)  # from below, in the bucket
    found = [bytearray() for _ in range(count)]  # many small arrays would keep the memory between them
    dtypes = [np.dtype(np.float32)] * count
    for piece in pieces():
        for stream, values in piece.items():
            inside = values[_buckets(values) == chosen[stream]].abs().numpy()
            found[stream] += inside.data.cast("B") if inside.size else b""
            dtypes[stream] = inside.dtype
    return [_before(np.frombuffer(f, d), rank) for f, d, rank in zip(found, dtypes, ranks, strict=True)]


def _before(found: np.ndarray, rank: int) -> float:
    """The number before the one of a rank from below; infinity before none."""
    if not found.size:
        return float("inf")
    smallest = np.partition(found, rank)[rank]
    return float(np.nextafter(smallest, -1.0, dtype=smallest.dtype))


def _buckets(piece: Tensor) -> Tensor:
    bits = piece.view(torch.int64 if piece.dtype == torch.float64 else torch.int32)
    return (bits >> (8 * piece.element_size() - 16)) & (_BUCKETS - 1)
