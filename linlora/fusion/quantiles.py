"""Finds the magnitude above which the largest values lie, of values that come in pieces: exactly, in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from linlora.storage.ahead import Ahead
from linlora.storage.tensors import finite

_BUCKETS = 2**15
Pieces = Callable[[str], Iterable[Mapping[int, Tensor]]]
"""The values of one name, piece by piece: of some streams, by number; flat, float32 or float64."""


def cut_below(names: Iterable[str], pieces: Pieces, count: int, keep: float) -> list[float]:
    """The number that the k largest magnitudes of a stream exceed, for each stream; k = ⌊keep · d⌋ and at least 1.

    Positive floating-point numbers are ordered as their bits are. The first pass counts values by their leading 16
    bits, which are sign, exponent and the start of the mantissa; the second sorts those of the one bucket that holds
    the k-th. Infinity for a stream without values. Raises ValueError where a value is NaN or infinity.

    Args:
        names: of the tensors or layers that are gone through, in each of the two passes; several at a time.
        pieces: the values of a name; of one dtype a stream.
        count: of streams.
        keep: the part of the d values of a stream that are kept.

    >>> values = {"q": {0: torch.tensor([1.0, -5.0])}, "k": {0: torch.tensor([3.0]), 2: torch.ones(2)}}
    >>> cuts = cut_below(values, lambda name: [values[name]], 3, 0.7)
    >>> [round(cut, 6) for cut in cuts], cuts[0] < 3.0
    ([3.0, inf, 1.0], True)
    """
    names = list(names)

    def counted(name: str) -> Tensor:
        counts = torch.zeros(count, _BUCKETS, dtype=torch.int64)
        for piece in pieces(name):
            for stream, values in piece.items():
                if not finite(values):
                    raise ValueError("ties: a vector holds NaN or infinity; the run that trained it diverged")
                counts[stream] += torch.bincount(_buckets(values), minlength=_BUCKETS)
        return counts

    counts = torch.zeros(count, _BUCKETS, dtype=torch.int64)
    for of_name in map(Ahead(names, counted), names):
        counts += of_name
    chosen, ranks = [], []
    for of_stream in counts:
        kept = max(1, int(keep * int(of_stream.sum())))
        from_above = of_stream.flip(0).cumsum(0)
        chosen.append(_BUCKETS - 1 - int(torch.searchsorted(from_above, kept)))
        ranks.append(int(from_above[_BUCKETS - 1 - max(0, chosen[-1])]) - kept)  # from below, in the bucket

    def inside(name: str) -> list[tuple[int, np.ndarray]]:
        return [(stream, values[_buckets(values) == chosen[stream]].abs().numpy())
                for piece in pieces(name) for stream, values in piece.items()]  # fmt: skip

    found = [bytearray() for _ in range(count)]  # many small arrays would keep the memory between them
    dtypes = [np.dtype(np.float32)] * count
    for pairs in map(Ahead(names, inside), names):
        for stream, values in pairs:
            found[stream] += values.data.cast("B") if values.size else b""
            dtypes[stream] = values.dtype
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
