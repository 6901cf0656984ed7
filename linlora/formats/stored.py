"""What lies in a file or folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from linlora.task_vector import TaskVector


@dataclass(frozen=True)
class Stored:
    """An adapter in a file or folder, not read yet.

    Attributes:
        path: of the file or folder.
        kind: what it is, in words.
        vector: its task vector; the tensors stay in the file until they are asked for.
        extras: what was trained beside the adapter and is no part of the vector, a head for instance: the values of
            parameters of the base model, by their names there.
        config: what `adapter_config.json` says; empty where there is none.
        notes: what a reader should know.
    """

    path: Path
    kind: str
    vector: TaskVector
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
