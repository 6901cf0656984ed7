"""Linearization points: the names of their tensors, their hash, and the error where two of them meet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor


class DifferentPointError(ValueError):
    """Vectors (or a vector and a model) of different linearization points, scopes or layers were combined."""


def point_name(name: str) -> str:
    """The name, in a vector's point, of the factor that a delta changes.

    >>> point_name("encoder.dense.dA")
    'encoder.dense.A0'
    """
    layer, _, delta = name.rpartition(".")
    return f"{layer}.{delta.removeprefix('d')}0"


def point_hash(point: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values. Values are hashed as float64, so a widened copy is the same point."""
    digest = hashlib.sha256()
    for name in sorted(point):
        values = point[name].double() + 0.0  # -0.0 and 0.0 are one value
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


def some(names: Iterable[str]) -> str:
    """The first names of many.

    >>> some("abcde")
    'a, b, c and 2 more'
    """
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
