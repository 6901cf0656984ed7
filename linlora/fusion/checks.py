"""Refusals of every method: vectors that do not add, options it does not take, numbers that are not finite."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

from linlora.storage.tensors import shapes
from linlora.vectors.base_models import common_base
from linlora.vectors.task_vector import TaskVector


def checked(vectors: Iterable[TaskVector]) -> Iterator[TaskVector]:
    """Go through task vectors, each compared with the first, its base model with all before it; at least one.

    Nothing here keeps a vector that was handed out, so a loop over a generator that loads them holds one at a time, if
    its body ends in `del vector`: a loop's variable lives until the next one is there.

    Raises ValueError for none, DifferentPointError for vectors that do not add, TypeError for what is no TaskVector.
    """
    first: TaskVector | None = None
    for box in map(_boxed, vectors):
        if not isinstance(box[0], TaskVector):
            raise TypeError(f"fuse: a TaskVector is expected, got {type(box[0]).__name__}")
        if first is None:  # what the others are compared with, without its values
            first = replace(box[0], deltas=shapes(box[0].deltas))
        first.check_same_point(box[0])
        first = replace(first, base_model=common_base(first.base_model, box[0].base_model))
        yield box.pop()
    if first is None:
        raise ValueError("fuse: no vectors were given")


def _boxed(vector: TaskVector) -> list[TaskVector]:
    return [vector]


def check_options(method: str, function: Callable[..., TaskVector], options: Mapping[str, Any]) -> None:
    """Raise a ValueError that lists a method's options where one is unknown, or one without a default is missing.

    A method that hands `**options` on takes any; whom it hands them to checks them.

    >>> from linlora.fusion.ties import ties
    >>> check_options("ties", ties, {"keep": 0.1})
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
    listed = f"its options are {', '.join(names)}" if names else "it has no options"
    unknown = [name for name in options if name not in names]
    if unknown and len(names) == len(parameters):
        raise ValueError(f"{method} takes no option {unknown[0]!r}; {listed}")
    missing = [name for name in required(function) if name not in options]
    if missing:
        raise ValueError(f"{method} needs the option {missing[0]!r}; {listed}")


def required(function: Callable[..., TaskVector]) -> list[str]:
    """The options of a method that have no default.

    >>> from linlora.fusion.lorahub import lorahub
    >>> required(lorahub)
    ['objective']
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD]


def check_finite(method: str, name: str, value: float | Sequence[float]) -> None:
    """Raise a ValueError unless a number, or every number of a sequence, is finite."""
    value = plain(value)
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in values):
        raise ValueError(f"{method}: {name} has to be finite, got {value}")


def plain(value: Any) -> Any:
    """Numbers of NumPy and torch, one or several, as Python's.

    >>> import numpy
    >>> plain(numpy.float64(0.5)), plain(numpy.arange(2)), plain(0.3)
    (0.5, [0, 1], 0.3)
    """
    return value.tolist() if hasattr(value, "tolist") else value


def check_number(method: str, name: str, value: float) -> None:
    """Raise a ValueError unless a value is one finite number."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{method}: {name} has to be a finite number, got {value!r}")


def check_count(method: str, name: str, value: int) -> None:
    """Raise a ValueError unless a value is a whole number above 0."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{method}: {name} has to be a whole number, at least 1, got {value!r}")
