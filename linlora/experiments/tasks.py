"""The interface of several tasks on one model; `image_suite.ImageSuite` and `training.suite.TaskSet` have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Mapping[str, Any]
"""The name of the "task", the "inputs" of the model (keyword arguments), and "labels" where there are such."""


class Tasks(Protocol):
    """Several tasks on one model. A model here is a plain one or a PeftModel, with any vector in it."""

    @property
    def trained_modules(self) -> tuple[str, ...]:
        """The modules of the base model that were trained beside the adapters, one of them for each task."""
        ...

    def scores(self, model: nn.Module, split: str) -> list[float]:
        """The score of each task on its validation or test split, larger is better."""
        ...

    def unlabeled(self, size: int, *, limit: int | None = ...) -> Sequence[Iterable[Batch]]:
        """For each task validation inputs in batches of a size, without labels: the same as often as one asks."""
        ...

    def labeled(self, size: int, limit: int) -> Sequence[Iterable[Batch]]:
        """For each task as many validation rows in batches of a size, with labels."""
        ...

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of the classes, for a batch."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of the model on a labeled batch."""
        ...
