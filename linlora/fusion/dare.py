"""DARE: drop most of every vector at random and rescale the rest, then combine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linlora.fusion.arithmetic import WeightedSum, task_arithmetic
from linlora.fusion.checks import check_number, check_options
from linlora.fusion.tensorwise import Rule, fused, mapped
from linlora.fusion.ties import Ties, ties
from linlora.storage.tensors import wide
from linlora.vectors.task_vector import TaskVector


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

    Holds what the combining method holds.

    >>> vector = TaskVector({"q.dB": torch.ones(8)}, None, "", {"q": 1.0}, "layer")
    >>> dare([vector], drop=0.5, scaling=1.0).deltas["q.dB"].unique().tolist()
    [0.0, 2.0]
    """
    methods: dict[str, Callable[..., TaskVector]] = {"task_arithmetic": task_arithmetic, "ties": ties}
    check_number("dare", "drop", drop)
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"dare: drop is a probability, at least 0 and below 1, got {drop}")
    if combine not in methods:
        raise ValueError(f"dare: unknown way to combine {combine!r}; choose one of {', '.join(methods)}")
    check_options(f"dare (combine='{combine}')", methods[combine], options)
    rule: Rule[Any] = Ties(**options) if combine == "ties" else WeightedSum("dare", **options)
    return fused(vectors, Thinned(rule, drop, seed))


def thin(delta: Tensor, drop: float, seed: int, index: int, name: str) -> Tensor:
    """m ⊙ δ / (1 − p) of the tensor of one name in the vector of one index; the same mask whenever it is made."""
    digest = hashlib.sha256(f"{seed} {index} {name}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:8], "little")))
    mask = torch.from_numpy(generator.random(delta.shape, dtype=np.float32)) < 1.0 - drop
    return (mask * delta.to(wide(delta.dtype))).div_(1.0 - drop)


class Thinned(Rule[Any]):
    """A rule that is shown thinned vectors."""

    method = "dare"

    def __init__(self, rule: Rule[Any], drop: float, seed: int) -> None:
        self.rule, self.drop, self.seed = rule, drop, seed

    def look(self, index: int, vector: TaskVector) -> None:
        self.rule.look(index, mapped(vector, lambda name, delta: thin(delta, self.drop, self.seed, index, name)))

    def add(self, state: Any, index: int, name: str, delta: Tensor) -> None:
        self.rule.add(state, index, name, thin(delta, self.drop, self.seed, index, name))

    def close(self, count: int) -> None:
        self.rule.close(count)

    def zero(self, like: Tensor) -> Any:
        return self.rule.zero(like)

    def survey(self, states: Iterable[Any]) -> None:
        self.rule.survey(states)

    def result(self, state: Any) -> Tensor | None:
        return self.rule.result(state)
