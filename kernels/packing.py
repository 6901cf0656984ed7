"""Problems and results taken apart: what a custom operator passes, and what autograd saves.

A problem is a NamedTuple that `packable` decorates. Packed it is a list of optional tensors and a list of numbers; a
result is a list of the tensors that are there. Which those are, the problem says: `outputs(**options)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES = {float: "float", bool: "bool", int: "int", str: "str", torch.dtype: "ScalarType"}

_PLACES: dict[type, tuple[tuple[int, ...], tuple[int, ...]]] = {}

AnyProblem = TypeVar("AnyProblem", bound=Any)
AnyResult = TypeVar("AnyResult", bound=Any)


class Output(NamedTuple):
    """The shape and the dtype of one result."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def packable(kind: type[AnyProblem]) -> type[AnyProblem]:
    """Decorates a kind of problem: notes which of its fields are tensors, by their annotations."""
    hints = list(get_type_hints(kind).values())
    tensors = tuple(i for i, hint in enumerate(hints) if hint is Tensor or Tensor in get_args(hint))
    _PLACES[kind] = tensors, tuple(i for i in range(len(hints)) if i not in tensors)
    return kind


def pack(problem: tuple) -> tuple[list[Any], list[Any]]:
    """The tensors of a problem, absent ones too, and its numbers, each in the order of its fields."""
    tensors, numbers = _PLACES[type(problem)]
    return [problem[i] for i in tensors], [problem[i] for i in numbers]


def unpack(kind: type[AnyProblem], tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> AnyProblem:
    """The problem that was packed."""
    fields: list[Any] = [None] * (len(tensors) + len(numbers))
    of_tensors, of_numbers = _PLACES[kind]
    for i, value in zip((*of_tensors, *of_numbers), (*tensors, *numbers), strict=True):
        fields[i] = value
    return kind(*fields)


def numbers_of(kind: type) -> dict[str, type]:
    """The fields of a problem that are no tensors, with their types."""
    hints = list(get_type_hints(kind).items())
    return dict(hints[i] for i in _PLACES[kind][1])


def schema(kind: type, options: dict[str, Any]) -> str:
    """The schema of the custom operator of a problem: its tensors in one list, then its numbers and the options."""
    types = numbers_of(kind) | {name: type(default) for name, default in options.items()}
    rest = "".join(f", {_SCHEMA_TYPES[of]} {name}" for name, of in types.items())
    return f"(Tensor?[] tensors{rest}) -> Tensor[]"


def empty(outputs: AnyResult, like: Tensor) -> AnyResult:
    """New tensors for what `outputs` says, on the device of a tensor."""
    made = [None if output is None else like.new_empty(output.shape, dtype=output.dtype) for output in outputs]
    return type(outputs)(*made)


def present(result: tuple) -> list[Tensor]:
    """What there is of a result: what a custom operator returns."""
    return [tensor for tensor in result if tensor is not None]


def restored(outputs: AnyResult, tensors: Sequence[Tensor]) -> AnyResult:
    """The result whose present tensors these are."""
    remaining = iter(tensors)
    return type(outputs)(*[None if output is None else next(remaining) for output in outputs])


def fake(kind: type, options: dict[str, Any]) -> Callable[..., list[Tensor]]:
    """The fake function of such an operator: empty tensors for what the problem says it returns."""

    def run(tensors: list[Tensor | None], *rest: Any) -> list[Tensor]:
        problem, chosen = unpacked(kind, options, tensors, rest)
        like = next(tensor for tensor in tensors if tensor is not None)
        return present(empty(problem.outputs(**chosen), like))

    return run


def unpacked(
    kind: type, options: dict[str, Any], tensors: list[Tensor | None], rest: Any
) -> tuple[Any, dict[str, Any]]:
    """The problem of an operator's arguments, and the options by name."""
    count = len(numbers_of(kind))
    return unpack(kind, tensors, rest[:count]), dict(zip(options, rest[count:], strict=True))
