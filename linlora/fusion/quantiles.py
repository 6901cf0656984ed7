"""The k-th largest magnitude of values that come in pieces, exactly and in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

_BUCKETS = 2**15


def kth_largest(pieces: Callable[[], Iterable[Tensor]], k: int) -> np.floating:
    """The k-th largest of the absolute values of flat tensors of one dtype, float32 or float64.

    Positive floating-point numbers are ordered as their bits are. The first pass counts values by their leading 16
    bits, which are sign, exponent and the start of the mantissa; the second sorts those of the one bucket that holds
    the k-th. Raises ValueError where a value is NaN or infinity.

    Args:
        pieces: called once for each pass.
        k: at least 1 and at most the number of values.

    >>> float(kth_largest(lambda: [torch.tensor([1.0, -5.0]), torch.tensor([3.0, 3.0])], 2))
    3.0
    """
    counts = torch.zeros(_BUCKETS, dtype=torch.int64)
    infinite = _BUCKETS
    for piece in pieces():
        infinite = int(_buckets(torch.tensor([float("inf")], dtype=piece.dtype)))
        counts += torch.bincount(_buckets(piece), minlength=_BUCKETS)
    if counts[infinite:].any():
        raise ValueError("ties: a vector holds NaN or infinity; the run that trained it diverged")
    from_above = counts.flip(0).cumsum(0)
    bucket = _BUCKETS - 1 - int(torch.searchsorted(from_above, k))
    rank = int(from_above[_BUCKETS - 1 - bucket]) - k  # from below, in the bucket
    found = [piece[_buckets(piece) == bucket].abs().numpy() for piece in pieces()]
    return np.partition(np.concatenate(found), rank)[rank]


def kept_from(pieces: Callable[[], Iterable[Mapping[int, Tensor]]], count: int, keep: float) -> list[float]:
    """The smallest magnitude that is kept of each of some streams: the k-th largest of d, k = ⌊keep · d⌋, at least 1.

    As `kth_largest`, of all streams in two passes. Infinity for a stream without values.

    Args:
        pieces: of some of the streams, by number; flat float32, called once for each pass.

    >>> kept_from(lambda: [{0: torch.tensor([1.0, -5.0])}, {0: torch.tensor([3.0]), 2: torch.ones(2)}], 3, 0.7)
    [3.0, inf, 1.0]
    """
    counts = torch.zeros(count, _BUCKETS, dtype=torch.int64)
    for piece in pieces():
        for stream, values in piece.items():
            counts[stream] += torch.bincount(_buckets(values), minlength=_BUCKETS)
    chosen, ranks = [], []
    for of_stream in counts:
        kept = max(1, int(keep * int(of_stream.sum())))
        from_above = of_stream.flip(0).cumsum(0)
        chosen.append(_BUCKETS - 1 - int(torch.searchsorted(from_above, kept)))
        ranks.append(int(from_above[_BUCKETS - 1 - max(0, chosen[-1])]) - kept)
    found: list[list[np.ndarray]] = [[] for _ in range(count)]
    for piece in pieces():
        for stream, values in piece.items():
            found[stream].append(values[_buckets(values) == chosen[stream]].abs().numpy())
    return [
        float(np.partition(np.concatenate(values), rank)[rank]) if sum(map(len, values)) else float("inf")
        for values, rank in zip(found, ranks, strict=True)
    ]


def _buckets(piece: Tensor) -> Tensor:
    bits = piece.view(torch.int64 if piece.dtype == torch.float64 else torch.int32)
    return (bits >> (8 * piece.element_size() - 16)) & (_BUCKETS - 1)
