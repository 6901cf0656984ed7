"""`Stored`: an adapter in a file or folder, opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from linlora.storage.tensors import shapes
from linlora.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class Stored:
    """An adapter in a file or folder, not read yet.

    Attributes:
        path: of the file or folder.
        kind: the format, in words.
        vector: its task vector; the tensors stay in the file until they are asked for.
        extras: parameters of the base model that were trained beside the adapter, a head for instance, by their names
            there; no part of the vector.
        config: the content of `adapter_config.json`; empty where there is none.
        notes: warnings for a reader.
    """

    path: Path
    kind: str
    vector: TaskVector
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def layer_sizes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every layer. Raises ValueError where the vector was saved without its point."""
        like = {**shapes(self.vector.known_point(str(self.path))), **shapes(self.vector.deltas)}
        sizes = {}
        for layer in self.vector.scalings:
            down = like[f"{layer}.A0"] if f"{layer}.A0" in like else like[f"{layer}.dA"]
            sizes[layer] = (like[f"{layer}.dB"].shape[0], down.shape[1])
        return sizes
