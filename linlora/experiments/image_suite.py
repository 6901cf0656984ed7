"""Tasks on images that are whole in memory: a network, and a frozen linear head for each task."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Split:
    """Images (n, 1, H, W) and their labels (n,), whole, on one device: no loader is needed."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Split:
        """The first images; all for None."""
        return Split(self.images[:count], self.labels[:count])

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageSuite:
    """A pre-trained network and tasks on it, as `linlora.experiments.tasks.Tasks` asks; the heads are no part of it.

    Attributes:
        network: takes `pixel_values`; its first output are the features (n, width), or tokens (n, tokens, width) of
            which the first is read. All of it is linearized at model scope.
        heads: a frozen linear head for each task, on the features.
    """

    network: nn.Module
    splits: Mapping[str, Mapping[SplitName, Split]]
    heads: Mapping[str, nn.Linear]

    trained_modules: ClassVar[tuple[str, ...]] = ()

    def scores(self, model: nn.Module, split: Any) -> list[float]:
        """The accuracy of a model on one split of every task, each read by its own head."""
        return [accuracy(model, self.heads[name], of_task[split]) for name, of_task in self.splits.items()]

    def unlabeled(self, size: int, limit: int | None = None) -> list[list[dict[str, Any]]]:
        return [
            [{"task": name, "inputs": {"pixel_values": images}} for images in seen.images.split(size)]
            for name, seen in self._seen(limit).items()
        ]

    def labeled(self, size: int, limit: int) -> list[list[dict[str, Any]]]:
        return [
            [batch | {"labels": labels} for batch, labels in zip(batches, seen.labels.split(size), strict=True)]
            for batches, seen in zip(self.unlabeled(size, limit), self._seen(limit).values(), strict=True)
        ]

    def _seen(self, limit: int | None) -> dict[str, Split]:
        """The first rows of each task that fusion methods may see."""
        return {name: of_task["validation"].first(limit) for name, of_task in self.splits.items()}

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self.heads[batch["task"]](features(model, **batch["inputs"]))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return cross_entropy(self.logits(model, batch), batch["labels"])

    def to(self, device: str) -> ImageSuite:
        splits = {name: {key: split.to(device) for key, split in task.items()} for name, task in self.splits.items()}
        return ImageSuite(self.network.to(device), splits, {name: head.to(device) for name, head in self.heads.items()})


class ImageData(Hashable, Protocol):
    """Where a suite comes from: a frozen dataclass, part of the settings."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def files(self) -> tuple[str, ...]:
        """The files that `prepare` writes; none where the package brings them."""
        ...

    def prepare(self, folder: Path, device: str) -> None: ...

    def open(self, folder: Path) -> ImageSuite:
        """On the CPU."""
        ...


def features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """The features that heads read, (n, width): the first output, or its first token."""
    output = model(pixel_values=pixel_values)
    first = output if isinstance(output, Tensor) else output[0]  # a tensor of baselines.FunctorchModel
    return first[:, 0] if first.ndim == 3 else first


@torch.no_grad()
def accuracy(model: nn.Module, head: nn.Linear, split: Split) -> float:
    predicted = head(features(model, split.images)).argmax(dim=-1)
    return (predicted == split.labels).double().mean().item()
