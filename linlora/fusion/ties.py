"""TIES: trim, elect a sign, and average the values that agree with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from linlora.fusion.arithmetic import wide
from linlora.fusion.checks import check_number, checked
from linlora.task_vector import TaskVector


def ties(vectors: Iterable[TaskVector], keep: float = 0.2, scaling: float = 1.0) -> TaskVector:
    """λ · mean of { tᵢ : sign tᵢ = sign Σᵢ tᵢ }, element by element (arXiv 2306.01708).

    Trim: tᵢ is δᵢ with all but its largest values, by magnitude and over the whole vector, set to zero. Elect: the sign
    of each element is that of Σᵢ tᵢ; where that is 0, the sign of most elements. Disjoint mean: over the tᵢ that have
    the elected sign, zeros not counted.

    Args:
        keep: the fraction of the values of each vector that survive the trim; 0.2 as published.
        scaling: λ; 1 as published without a validation split.

    In one pass, and in memory that does not grow with the vectors: the positive and the negative values are summed and
    counted apart, which is all the elected sign chooses between. Holds five vectors: the one that is added, its
    magnitudes, the two sums, and the counts of 16 bits.

    >>> a, b, c = [3.0, -1.0, 2.0, 0.1], [1.0, -2.0, -4.0, 0.1], [-1.0, 0.1, 3.0, 5.0]
    >>> vectors = [TaskVector({"q.dB": torch.tensor(x)}, None, "", {"q": 1.0}, "layer") for x in (a, b, c)]
    >>> ties(vectors, keep=0.5).deltas["q.dB"].tolist()  # trimmed: [3 0 2 0], [0 -2 -4 0], [0 0 3 5]
    [3.0, -2.0, 2.5, 5.0]
    """
    check_number("ties", "scaling", scaling)
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"ties: keep is the fraction of values kept, above 0 and at most 1, got {keep}")
    like: TaskVector | None = None
    for vector in checked(vectors):
        if like is None:
            like = replace(vector, deltas={name: delta.to("meta") for name, delta in vector.deltas.items()})
            sides = {name: _Sides(delta) for name, delta in vector.deltas.items()}
        _add(sides, vector, _threshold(vector, keep))
        del vector  # before the next one is loaded
    assert like is not None
    balance = sum(int(side.signs().sum(dtype=torch.int64)) for side in sides.values())
    majority = float(np.sign(balance))
    deltas = {n: (scaling * sides.pop(n).mean(majority)).to(delta.dtype) for n, delta in like.deltas.items()}
    return replace(like, deltas=deltas)


class _Sides:
    """The positive and the negative values seen of one tensor: their sums and their numbers."""

    def __init__(self, like: Tensor) -> None:
        self.up, self.down = (torch.zeros_like(like, dtype=wide(like)) for _ in range(2))
        self.ups, self.downs = (torch.zeros_like(like, dtype=torch.int16) for _ in range(2))

    def add(self, values: Tensor) -> None:
        self.up += values.clamp(min=0.0)
        self.down += values.clamp(max=0.0)
        self.ups += values > 0
        self.downs += values < 0

    def signs(self) -> Tensor:
        return (self.up + self.down).sign()

    def mean(self, majority: float) -> Tensor:
        """Of the values with the elected sign."""
        signs = self.signs()
        signs = torch.where(signs == 0, majority, signs)
        up, down = self.up / self.ups.clamp(min=1), self.down / self.downs.clamp(min=1)
        return torch.where(signs > 0, up, torch.where(signs < 0, down, 0.0))


def _add(sides: Mapping[str, _Sides], vector: TaskVector, threshold: float) -> None:
    """Add the trimmed vector."""
    for name, delta in vector.deltas.items():
        values = delta.to(wide(delta))
        sides[name].add(torch.where(values.abs() >= threshold, values, 0.0))


def _threshold(vector: TaskVector, keep: float) -> float:
    """The smallest magnitude that is kept: the k-th largest of the d values, k = ⌊keep · d⌋ and at least 1."""
    magnitudes = torch.cat([delta.to(wide(delta)).flatten() for delta in vector.deltas.values()]).abs_().numpy()
    rank = magnitudes.size - max(1, int(keep * magnitudes.size))
    magnitudes.partition(rank)
    if not np.isfinite(magnitudes[rank:].max()):  # NaN sorts last
        raise ValueError("ties: a vector holds NaN or infinity; the run that trained it diverged")
    return float(magnitudes[rank])
