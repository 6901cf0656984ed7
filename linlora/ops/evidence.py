"""The evidence by which a backend is chosen: evidence.json, which `linlora bench evidence` makes of bench/results/.

An entry says of a backend, an op, an architecture, a class of shapes, a dtype and dropout or none: whether all cases of
a run on a GPU were correct, and how fast they were. The newest run that measured this decides. What no run measured is
not proven.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

TABLE = Path(__file__).with_name("evidence.json")
ShapeClass = Literal["small", "medium", "large", "any"]


def shape_class(m: int, n: int) -> ShapeClass:
    """How an output (m, n) of a layer is bound.

    "small": at most 64 rows, by launches and by reading W. "large": at least 2²² elements, 128 tiles of 128 × 256, by
    arithmetic. "medium": between. Ops whose choice does not depend on the shape have the one class "any".

    >>> shape_class(1, 4096), shape_class(512, 4096), shape_class(8192, 4096)
    ('small', 'medium', 'large')
    """
    if m <= 64:
        return "small"
    return "large" if m * n >= 2**22 else "medium"


@dataclass(frozen=True)
class Entry:
    """What a run says of one backend. Without `correct` there is no speed; `max_rank` is the highest that was run."""

    op: str
    backend: str
    architecture: str
    shape: str
    dtype: str
    dropout: bool
    correct: bool
    speedup_over_torch: float
    max_rank: int
    cases: int
    gpu: str
    date: str
    commit: str
    file: str

    @property
    def proves(self) -> bool:
        """Green, and faster than composed torch."""
        return self.correct and self.speedup_over_torch > 1.0

    def __str__(self) -> str:
        result = f"{self.speedup_over_torch:.2f}x composed torch" if self.correct else "WRONG"
        dropout = " with dropout" if self.dropout else ""
        shapes = "" if self.shape == "any" else f" {self.shape} shapes in"
        return f"{result}: {self.cases} cases,{shapes} {self.dtype}{dropout}, {self.gpu}, {self.file}"


def known(op: str, architecture: str, shape: str, dtype: torch.dtype | None, dropout: bool) -> list[Entry]:
    """The newest word on every backend, the fastest first; `dtype=None` takes any."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    newest: dict[str, Entry] = {}
    for entry in entries():
        if (entry.op, entry.architecture, entry.shape, entry.dropout) == (op, architecture, shape, dropout) and (
            name in (None, entry.dtype)
        ):
            newest[entry.backend] = entry
    return sorted(newest.values(), key=lambda entry: -entry.speedup_over_torch)


def executed_on(op: str, backend: str) -> list[str]:
    """The GPUs on which a committed run has executed an op of a backend, right or wrong."""
    return list(dict.fromkeys(entry.gpu for entry in entries() if (entry.op, entry.backend) == (op, backend)))


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every entry, the oldest run first."""
    return tuple(Entry(**entry) for entry in json.loads(TABLE.read_text()))
