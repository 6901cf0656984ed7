"""Weighted sums of task vectors: average, task arithmetic, negation.

Each goes through the vectors once and holds two: the sum and the one that is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from linlora.fusion.checks import check_finite, check_number, checked
from linlora.task_vector import TaskVector

PUBLISHED_SCALING = 0.3


def average(vectors: Iterable[TaskVector]) -> TaskVector:
    """Σᵢ δᵢ / n.

    >>> u, v = (TaskVector({"q.dB": torch.tensor(x)}, None, "", {"q": 1.0}, "layer") for x in ([1.0, 2.0], [3.0, -2.0]))
    >>> average([u, v]).deltas["q.dB"].tolist()
    [2.0, 0.0]
    """
    return weighted_sum(vectors, 1.0, "average", mean=True)


def task_arithmetic(vectors: Iterable[TaskVector], scaling: float | Sequence[float] = PUBLISHED_SCALING) -> TaskVector:
    """Σᵢ λᵢ δᵢ (arXiv 2212.04089): one λ for all, 0.3 as published, or one for each vector.

    Search λ on a validation split (`linlora.fusion.search`), never on the test split.

    >>> u, v = (TaskVector({"q.dB": torch.tensor(x)}, None, "", {"q": 1.0}, "layer") for x in ([1.0, 2.0], [3.0, -2.0]))
    >>> task_arithmetic([u, v], scaling=0.5).deltas["q.dB"].tolist()
    [2.0, 0.0]
    >>> task_arithmetic([u, v], scaling=[1.0, -2.0]).deltas["q.dB"].tolist()
    [-5.0, 6.0]
    """
    return weighted_sum(vectors, scaling, "task_arithmetic")


def negation(vectors: Iterable[TaskVector], scaling: float = 1.0) -> TaskVector:
    """−λ Σᵢ δᵢ (arXiv 2212.04089): forgetting the task of a vector, or the tasks of several.

    The largest λ that keeps 95 % of the accuracy on a control task is chosen there; 1 is the plain negative.

    >>> v = TaskVector({"q.dB": torch.tensor([1.0, -2.0])}, None, "", {"q": 1.0}, "layer")
    >>> negation([v], scaling=0.5).deltas["q.dB"].tolist()
    [-0.5, 1.0]
    """
    check_number("negation", "scaling", scaling)
    return weighted_sum(vectors, -float(scaling), "negation")


def weighted_sum(
    vectors: Iterable[TaskVector],
    scaling: float | Sequence[float],
    method: str,
    *,
    mean: bool = False,
    change: Callable[[Tensor], Tensor] | None = None,
) -> TaskVector:
    """Σᵢ λᵢ change(δᵢ), divided by the number of vectors for a `mean`; accumulated wide and rounded once.

    `change` is called for the tensors of each vector in the order of their names.
    """
    check_finite(method, "scaling", scaling)
    common = isinstance(scaling, (int, float))
    weights = [float(scaling)] if isinstance(scaling, (int, float)) else [float(weight) for weight in scaling]
    total: TaskVector | None = None
    dtypes = {}
    count = 0
    for vector in checked(vectors):
        if total is None:
            dtypes = {name: delta.dtype for name, delta in vector.deltas.items()}
            total = replace(vector, deltas={n: torch.zeros_like(d, dtype=wide(d)) for n, d in vector.deltas.items()})
        if common or count < len(weights):
            _add(total, vector, weights[0 if common else count], change)
        count += 1
        del vector  # before the next one is loaded
    if not common and len(weights) != count:
        raise ValueError(f"{method}: {len(weights)} scalings for {count} vectors; pass one each, or one")
    assert total is not None
    if mean:
        for delta in total.deltas.values():
            delta.div_(count)
    return replace(total, deltas={name: delta.to(dtypes[name]) for name, delta in total.deltas.items()})


def _add(total: TaskVector, vector: TaskVector, weight: float, change: Callable[[Tensor], Tensor] | None) -> None:
    for name in sorted(vector.deltas):
        delta = vector.deltas[name]
        total.deltas[name].add_(delta if change is None else change(delta), alpha=weight)


def wide(delta: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32, or the tensor's where that is wider."""
    return torch.promote_types(delta.dtype, torch.float32)
