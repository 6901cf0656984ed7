"""TIES on the values of ΔW, exactly, in blocks of rows: for a merged model, since the result has full rank.

Trim and elect need every value of ΔW = s B A, as many as the base has. A block of rows is a product of a few rows of B,
so it is made, used and dropped: two passes for the magnitude where each adapter is trimmed, and one to merge.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from linlora.fusion.checks import check_number
from linlora.fusion.layerwise import weight_vectors
from linlora.fusion.quantiles import cut_below
from linlora.fusion.sides import Sides, check_keep
from linlora.fusion.ties import PUBLISHED_KEEP, PUBLISHED_SCALING
from linlora.layers.weights import Update, blocks
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector


class DenseTies:
    """λ · mean of { tᵢ : sign tᵢ = sign Σᵢ tᵢ } of the trimmed values of every ΔWᵢ (arXiv 2306.01708).

    Where the sum is zero, up to rounding, the result is; a layer that an adapter lacks counts for nothing in the mean.

    Args:
        vectors: in weight space.
        keep: the part of the values of each adapter, over all its layers, that are kept; 0.2 as published.
        scaling: λ; 1 as published without a validation split.

    >>> A, B = torch.eye(2), torch.tensor([[3.0, 1.0], [0.5, -2.0]])
    >>> vector = WeightVector({"q.dA": A, "q.dB": B}, {}, "", {"q": 1.0}, "weight")
    >>> ties = DenseTies([vector, -0.1 * vector], keep=0.5)
    >>> ties.rows([Update(A, B), Update(A, -0.1 * B)], [0, 1], slice(0, 2)).tolist()
    [[3.0, 0.0], [0.0, -2.0]]
    """

    def __init__(
        self, vectors: Sequence[TaskVector], keep: float = PUBLISHED_KEEP, scaling: float = PUBLISHED_SCALING
    ) -> None:
        check_number("ties", "scaling", scaling)
        check_keep("ties", keep)
        self.scaling = scaling
        in_weights = weight_vectors(vectors)
        self.cuts = [cut_below(v.scalings, functools.partial(_values, v), 1, keep)[0] for v in in_weights]

    def rows(self, updates: Sequence[Update], indices: Sequence[int], rows: slice) -> Tensor:
        """The merged ΔW of some rows of a stored weight.

        Args:
            updates: the ΔW of the layer, of the vectors at `indices`.
        """
        parts = (hardshrink(_block(update, rows), self.cuts[i]) for update, i in zip(updates, indices, strict=True))
        return self.scaling * Sides.of(parts).mean(rounding=16 * torch.finfo(updates[0].B.dtype).eps)


def _values(vector: WeightVector, layer: str) -> Iterator[dict[int, Tensor]]:
    """The values of the ΔW of a layer in blocks, as one stream."""
    update = vector.update(layer)
    for rows in blocks((len(update.B), update.A.shape[1])):
        yield {0: _block(update, rows).flatten()}


def _block(update: Update, rows: slice) -> Tensor:
    return update.left[rows] @ update.right
