"""An adapter in a file or folder."""

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

    def layer_sizes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every layer. Raises ValueError where the vector was saved without its point."""
        like = {**shapes(self.vector.point or {}), **shapes(self.vector.deltas)}
        sizes = {}
        for layer in self.vector.scalings:
            down = next((like[name] for name in (f"{layer}.A0", f"{layer}.dA") if name in like), None)
            if down is None:
                raise ValueError(
                    f"{self.path}: the vector was saved without its point (include_point=False), and ΔW is of both; "
                    "use the vector with its point"
                )
            sizes[layer] = (like[f"{layer}.dB"].shape[0], down.shape[1])
        return sizes
