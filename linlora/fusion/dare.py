"""DARE: drop most of every vector at random and rescale the rest, then combine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from linlora.fusion.arithmetic import PUBLISHED_SCALING, task_arithmetic, weighted_sum, wide
from linlora.fusion.checks import check_options
from linlora.fusion.ties import ties
from linlora.task_vector import TaskVector


def dare(
    vectors: Iterable[TaskVector],
    drop: float = 0.9,
    combine: str = "task_arithmetic",
    seed: int = 0,
    **options: Any,
) -> TaskVector:
    """combine(m₁ ⊙ δ₁ / (1 − p), …) with mᵢ zero with probability p, else one (arXiv 2311.03099).

    The expectation of each vector is unchanged. The paper drops 90 % without loss, up to 99 % of larger models.

    Args:
        drop: p, at least 0 and below 1.
        combine: "task_arithmetic" or "ties".
        seed: of the masks; those of the vectors are independent.
        options: of the combining method, its own defaults otherwise: scaling, and keep for ties.

    Holds two vectors for task arithmetic; one more than `ties` for ties.

    >>> vector = TaskVector({"q.dB": torch.ones(8)}, None, "", {"q": 1.0}, "layer")
    >>> dare([vector], drop=0.5, scaling=1.0).deltas["q.dB"].unique().tolist()
    [0.0, 2.0]
    """
    methods: dict[str, Callable[..., TaskVector]] = {"task_arithmetic": task_arithmetic, "ties": ties}
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"dare: drop is a probability, at least 0 and below 1, got {drop}")
    if combine not in methods:
        raise ValueError(f"dare: unknown way to combine {combine!r}; choose one of {', '.join(methods)}")
    check_options(f"dare (combine='{combine}')", methods[combine], options)
    thin = _Thin(drop, seed)
    if combine == "ties":
        return ties(map(thin.vector, vectors), **options)
    return weighted_sum(vectors, options.get("scaling", PUBLISHED_SCALING), "dare", change=thin)


class _Thin:
    """Drops values of one tensor after the other: called in one order, the same values for one seed."""

    def __init__(self, drop: float, seed: int) -> None:
        self.kept = 1.0 - drop
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, delta: Tensor) -> Tensor:
        mask = torch.empty(delta.shape, dtype=wide(delta)).bernoulli_(self.kept, generator=self.generator)
        return mask.div_(self.kept).mul_(delta)

    def vector(self, vector: TaskVector) -> TaskVector:
        return replace(vector, deltas={name: self(vector.deltas[name]) for name in sorted(vector.deltas)})
