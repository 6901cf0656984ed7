"""Weighted sums of task vectors: average, task arithmetic, negation.

Each goes through the vectors once and holds two: the sum and the one that is added. Of vectors in files it holds two
tensors. In weight space a sum is the factors side by side, Σ λᵢ ΔWᵢ = [λ₁ B₁, …] [A₁; …], and all vectors are held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from linlora.fusion.checks import check_finite, check_number, plain
from linlora.fusion.layerwise import peek, summed, weight_vectors
from linlora.fusion.tensorwise import Rule, fused
from linlora.fusion.truncation import Cut, OutRank
from linlora.storage.tensors import wide
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector

PUBLISHED_SCALING = 0.3


def average(vectors: Iterable[TaskVector], out_rank: OutRank = "exact", energy: float | None = None) -> TaskVector:
    """Σᵢ δᵢ / n. In weight space `out_rank` and `energy` cut the rank of the result (`linlora.fusion.truncation`).

    >>> import torch
    >>> u, v = (TaskVector({"q.dB": torch.tensor(x)}, None, "", {"q": 1.0}, "layer") for x in ([1.0, 2.0], [3.0, -2.0]))
    >>> average([u, v]).deltas["q.dB"].tolist()
    [2.0, 0.0]
    """
    return _summed(vectors, WeightedSum("average", 1.0, mean=True), out_rank, energy)


def task_arithmetic(
    vectors: Iterable[TaskVector],
    scaling: float | Sequence[float] = PUBLISHED_SCALING,
    out_rank: OutRank = "exact",
    energy: float | None = None,
) -> TaskVector:
    """Σᵢ λᵢ δᵢ (arXiv 2212.04089): one λ for all, 0.3 as published, or one for each vector.

    Search λ on a validation split (`linlora.fusion.search`), never on the test split.

    >>> import torch
    >>> u, v = (TaskVector({"q.dB": torch.tensor(x)}, None, "", {"q": 1.0}, "layer") for x in ([1.0, 2.0], [3.0, -2.0]))
    >>> task_arithmetic([u, v], scaling=0.5).deltas["q.dB"].tolist()
    [2.0, 0.0]
    >>> task_arithmetic([u, v], scaling=[1.0, -2.0]).deltas["q.dB"].tolist()
    [-5.0, 6.0]
    """
    return _summed(vectors, WeightedSum("task_arithmetic", scaling), out_rank, energy)


def negation(
    vectors: Iterable[TaskVector],
    scaling: float = 1.0,
    out_rank: OutRank = "exact",
    energy: float | None = None,
) -> TaskVector:
    """−λ Σᵢ δᵢ (arXiv 2212.04089): forgetting the task of a vector, or the tasks of several.

    The largest λ that keeps 95 % of the accuracy on a control task is chosen there; 1 is the plain negative.

    >>> import torch
    >>> v = TaskVector({"q.dB": torch.tensor([1.0, -2.0])}, None, "", {"q": 1.0}, "layer")
    >>> negation([v], scaling=0.5).deltas["q.dB"].tolist()
    [-0.5, 1.0]
    """
    check_number("negation", "scaling", scaling)
    return _summed(vectors, WeightedSum("negation", -float(scaling)), out_rank, energy)


def _summed(vectors: Iterable[TaskVector], rule: WeightedSum, out_rank: OutRank, energy: float | None) -> TaskVector:
    kind, vectors = peek(vectors)
    if kind is WeightVector:
        in_weights = weight_vectors(vectors)
        weights = rule.weights_of(len(in_weights))
        return summed(in_weights, lambda _: weights, out_rank, energy)
    if not Cut(out_rank, energy).exact:
        raise ValueError(
            f"{rule.method}: out_rank and energy cut what adapters add to the weights; vector.cast('weight') is that"
        )
    return fused(vectors, rule)


class WeightedSum(Rule[Tensor]):
    """Σᵢ λᵢ δᵢ, divided by the number of vectors for a `mean`; accumulated wide and rounded once."""

    def __init__(self, method: str, scaling: float | Sequence[float] = PUBLISHED_SCALING, mean: bool = False) -> None:
        check_finite(method, "scaling", scaling)
        self.method = method
        scaling = plain(scaling)
        self.weights = [float(w) for w in scaling] if isinstance(scaling, Iterable) else float(scaling)
        self.mean = mean
        self.count = 0

    def close(self, count: int) -> None:
        self.count = count
        if isinstance(self.weights, list) and len(self.weights) != count:
            raise ValueError(f"{self.method}: {len(self.weights)} scalings for {count} vectors; pass one each, or one")

    def weights_of(self, count: int) -> list[float]:
        """The weight of each of so many vectors."""
        self.close(count)
        weights = self.weights if isinstance(self.weights, list) else [self.weights] * count
        return [weight / count for weight in weights] if self.mean else weights

    def zero(self, like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=wide(like.dtype))

    def add(self, state: Tensor, index: int, name: str, delta: Tensor) -> None:
        if isinstance(self.weights, float):
            state.add_(delta.to(state.dtype), alpha=self.weights)
        elif index < len(self.weights):  # `close` refuses the others
            state.add_(delta.to(state.dtype), alpha=self.weights[index])

    def result(self, state: Tensor) -> Tensor:
        return state / self.count if self.mean else state
