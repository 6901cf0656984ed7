"""TIES: trim, elect a sign, and average the values that agree with it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from linlora.fusion.checks import check_number
from linlora.fusion.quantiles import cut_below
from linlora.fusion.sides import Sides, check_keep
from linlora.fusion.tensorwise import Rule, fused
from linlora.storage.tensors import shapes, wide
from linlora.vectors.task_vector import TaskVector

PUBLISHED_KEEP, PUBLISHED_SCALING = 0.2, 1.0


def ties(vectors: Iterable[TaskVector], keep: float = PUBLISHED_KEEP, scaling: float = PUBLISHED_SCALING) -> TaskVector:
    """λ · mean of { tᵢ : sign tᵢ = sign Σᵢ tᵢ }, element by element (arXiv 2306.01708).

    Trim: tᵢ is δᵢ with all but its largest values, by magnitude and over the whole vector, set to zero. Elect: the sign
    of each element is that of Σᵢ tᵢ; where that is 0, the sign of most elements. Disjoint mean: over the tᵢ that have
    the elected sign, zeros not counted.

    Args:
        keep: the fraction of the values of each vector that survive the trim; 0.2 as published.
        scaling: λ; 1 as published without a validation split.

    In memory that does not grow with the vectors: the positive and the negative values are summed and counted apart,
    which is all the elected sign chooses between. Holds four vectors: the one that is added, the two sums, and the
    counts of 16 bits. Vectors in files are gone through three times, twice for the magnitude where each is trimmed and
    once to fuse, a tensor at a time; once more where values cancel exactly.

    >>> a, b, c = [3.0, -1.0, 2.0, 0.1], [1.0, -2.0, -4.0, 0.1], [-1.0, 0.1, 3.0, 5.0]
    >>> vectors = [TaskVector({"q.dB": torch.tensor(x)}, None, "", {"q": 1.0}, "layer") for x in (a, b, c)]
    >>> ties(vectors, keep=0.5).deltas["q.dB"].tolist()  # trimmed: [3 0 2 0], [0 -2 -4 0], [0 0 3 5]
    [3.0, -2.0, 2.5, 5.0]
    """
    return fused(vectors, Ties(keep, scaling))


class Ties(Rule[Sides]):
    """The rule of `ties`."""

    method = "ties"

    def __init__(self, keep: float = PUBLISHED_KEEP, scaling: float = PUBLISHED_SCALING) -> None:
        check_number("ties", "scaling", scaling)
        check_keep("ties", keep)
        self.keep, self.scaling = keep, scaling
        self.cuts: dict[int, tuple[torch.dtype, float]] = {}
        self.majority: float | None = None

    def look(self, index: int, vector: TaskVector) -> None:
        """Find where the vector is cut."""
        deltas, dtype = vector.deltas, wide(*(like.dtype for like in shapes(vector.deltas).values()))
        below = cut_below(deltas, lambda name: [{0: deltas[name].to(dtype).flatten()}], 1, self.keep)
        self.cuts[index] = dtype, below[0]

    def zero(self, like: Tensor) -> Sides:
        return Sides(like)

    def add(self, state: Sides, index: int, name: str, delta: Tensor) -> None:
        dtype, below = self.cuts[index]
        state.add(hardshrink(delta.to(dtype), below))

    def survey(self, states: Iterable[Sides]) -> None:
        """Elect the sign of most elements."""
        self.majority = float(np.sign(sum(int(state.signs().sum(dtype=torch.int64)) for state in states)))

    def result(self, state: Sides) -> Tensor | None:
        if self.majority is None and state.cancel():
            return None
        return self.scaling * state.mean(self.majority or 0.0)
