"""What the comparison asks of tasks: implemented for the quickstart's (`digits`) and for recipes (`recipe`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Tasks(Protocol):
    """Several tasks on one model. A model here is a plain one or a PeftModel, with any vector in it."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def trained_modules(self) -> tuple[str, ...]:
        """The modules of the base model that were trained beside the adapters, one of them for each task."""
        ...

    def scores(self, model: nn.Module, split: str) -> list[float]:
        """The score of each task on its validation or test split, larger is better."""
        ...

    def loss(self, model: nn.Module) -> float:
        """The mean loss over tasks on a few labelled validation examples of each."""
        ...

    def unlabeled(self, size: int) -> Sequence[Iterable[Any]]:
        """For each task its validation inputs in batches of a size, without labels, as often as one asks for them."""
        ...

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """What the model says of each class, for a batch of `unlabeled`."""
        ...
