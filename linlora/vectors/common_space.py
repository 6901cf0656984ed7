"""Brings vectors into one space to be fused in: that of their one starting point, or weight space, ΔW."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from linlora.vectors.points import DifferentPointError
from linlora.vectors.task_vector import TaskVector


def in_one_space(
    vectors: Sequence[TaskVector], names: Sequence[str], scope: str | None = None, base: str | None = None
) -> tuple[list[TaskVector], str]:
    """The vectors in a space in which they add, and a note where they were brought into weight space unasked.

    Vectors of one starting point stay there. They are brought into weight space, where that is exact, if `scope` is
    "weight", if one of them is there, or if plain LoRA is among vectors of several starts or kinds.

    Args:
        names: of the vectors, for messages.
        base: the base model of all, where they name it differently.

    Raises DifferentPointError for vectors that do not add, ValueError for one that is no change of weights.

    >>> import linlora
    >>> models = [linlora.testing.tiny_model("bert", seed=seed) for seed in (0, 1)]
    >>> runs = [TaskVector.from_model(model, point=TaskVector.from_model(model)) for model in models]
    >>> vectors, note = in_one_space(runs, ["one", "other"])
    >>> [vector.scope for vector in vectors], note
    (['weight', 'weight'], 'not of one start: fused as what they add to the weights, exactly')
    """
    if scope not in (None, "weight"):
        raise ValueError(f"--scope {scope}: 'weight', or the scope of the vectors if left out")
    if base is not None:
        vectors = [replace(vector, base_model=base) for vector in vectors]
    scopes, note = {vector.scope for vector in vectors}, ""
    starts = {(vector.scope, vector.point_hash) for vector in vectors}
    if scope is None and "lora" in scopes <= {"lora", "layer"} and len(starts) > 1:
        scope, note = "weight", "not of one start: fused as what they add to the weights, exactly"
    if scope or "weight" in scopes:
        vectors = [_in_weights(vector, name) for vector, name in zip(vectors, names, strict=True)]
    for (one, first), (other, second) in itertools.combinations(zip(vectors, names, strict=True), 2):
        try:
            one.check_same_point(other)
        except DifferentPointError as error:
            remedy = "" if scope or scopes & {"weight", "model"} else ". Or fuse ΔW: linlora fuse ... --scope weight"
            raise DifferentPointError(f"{first} and {second}: {error}{remedy}") from error
    return list(vectors), note


def _in_weights(vector: TaskVector, name: str) -> TaskVector:
    try:
        return vector.cast("weight")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
