"""Fusion: many task vectors of one linearization point into one. A method is a function from vectors to a vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from linlora.task_vector import TaskVector


def average(vectors: Sequence[TaskVector]) -> TaskVector:
    """Σᵢ δᵢ / n."""
    return sum(vectors[1:], start=vectors[0]) / len(vectors)


def task_arithmetic(vectors: Sequence[TaskVector], scaling: float | Sequence[float] = 0.3) -> TaskVector:
    """Σᵢ λᵢ δᵢ (arXiv 2212.04089): one λ for all, 0.3 as published, or one for each vector.

    Search λ on a validation split, never on the test split.
    """
    scalings = [float(scaling)] * len(vectors) if isinstance(scaling, (int, float)) else [float(s) for s in scaling]
    if len(scalings) != len(vectors):
        raise ValueError(f"task_arithmetic: {len(scalings)} scalings for {len(vectors)} vectors; pass one each, or one")
    if not all(math.isfinite(s) for s in scalings):
        raise ValueError(f"task_arithmetic: scaling has to be finite, got {scaling}")
    terms = [s * vector for s, vector in zip(scalings, vectors, strict=True)]
    return sum(terms[1:], start=terms[0])


METHODS: dict[str, Callable[..., TaskVector]] = {"average": average, "task_arithmetic": task_arithmetic}


def fuse(
    vectors: Sequence[TaskVector], method: str = "task_arithmetic", **options: float | Sequence[float]
) -> TaskVector:
    """Fuse task vectors by one of `linlora.fusion.METHODS`; the options are the method's keyword arguments.

    Raises ValueError for no vectors or an unknown method, DifferentPointError for vectors of different points.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> vector = linlora.TaskVector.from_model(model)
    >>> linlora.fuse([vector, vector], "task_arithmetic", scaling=0.5).norm()
    0.0
    """
    vectors = list(vectors)
    if not vectors:
        raise ValueError("fuse: no vectors were given")
    if method not in METHODS:
        raise ValueError(f"fuse: unknown method {method!r}; choose one of {', '.join(METHODS)}")
    return METHODS[method](vectors, **options)
