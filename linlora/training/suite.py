"""Several tasks on one model: what a task vector, of one task or fused of many, scores on each of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linlora.training.adapted import adapt
from linlora.training.evaluation import arithmetic, evaluate, on_device
from linlora.training.head import set_head
from linlora.training.task import Task
from linlora.vectors.products import evaluating
from linlora.vectors.task_vector import TaskVector, apply
from linlora.vectors.weight_vector import WeightVector

_SHARED = ("model", "kind", "lora.", "model_options.")


class Suite:
    """One model for the vectors of one linearization point; the head of each task is put in where it is asked.

    Args:
        tasks: by name; they share model, kind and LoRA settings.
        like: a vector of the point and scope the model is put at; in weight space, of the layers and ranks it holds.
        heads: of the tasks whose head was trained (`Run.head`).

    Raises ValueError for tasks of different models or LoRA settings, or a trained head that is missing.
    """

    def __init__(
        self, tasks: Mapping[str, Task], like: TaskVector, heads: Mapping[str, Mapping[str, Tensor] | None]
    ) -> None:
        self.tasks, self.heads = dict(tasks), dict(heads)
        first = next(iter(tasks.values()))
        for name, task in tasks.items():
            odd = [d for d in first.settings.differences(task.settings) if d.startswith(_SHARED)]
            if odd:
                raise ValueError(f"tasks '{first.settings.name}' and '{name}' do not share one model: {'; '.join(odd)}")
            if self._needs_head(name):
                raise ValueError(f"task '{name}' has a head that was trained; name the folder of its run")
        if isinstance(like, WeightVector):
            self.model = adapt(first, method="lora", holding=like).model
        else:
            self.model = adapt(first, like if like.point is not None else None, method=like.scope).model
        device = "cuda" if torch.cuda.is_available() and not first.settings.training.get("use_cpu") else "cpu"
        self.model.to(device)

    def scores(
        self, vector: TaskVector, split: str, limit: int | None = None, progress: bool = False
    ) -> dict[str, dict[str, float]]:
        """What `evaluate` returns for each task with a vector in the model."""
        apply(self.model, vector)
        results = {}
        for name, task in self.tasks.items():
            self.enter(name)
            results[name] = evaluate(self.model, task, split, limit, progress)
        return results

    def enter(self, name: str) -> Task:
        """Put the head of a task into the model."""
        if (head := self.heads.get(name)) is not None:
            set_head(self.model, head)
        return self.tasks[name]

    def loss(self, vector: TaskVector, split: str, limit: int) -> float:
        """The loss with a vector, on the first rows of a split, the mean over tasks: LoraHub's objective."""
        apply(self.model, vector)
        losses = []
        for name in self.tasks:
            task = self.enter(name)
            rows = task.rows(split)
            batch = on_device(task.batch([rows[i] for i in range(min(limit, len(rows)))]), self.device)
            with evaluating(self.model), torch.no_grad(), arithmetic(task, self.device):
                losses.append(float(task.batch_loss(self.model, batch)))
        return statistics.fmean(losses)

    def unlabeled(self, split: str, size: int, limit: int | None = None) -> list[Batches]:
        """For each task its batches without labels, for AdaMerging and `predictor`; `logits` takes them."""
        return [Batches(name, task, split, size, limit) for name, task in self.tasks.items()]

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The logits of a batch of `unlabeled`, of the classes of its task."""
        task = self.enter(batch["task"])
        with arithmetic(task, self.device):
            return task.logits(model, on_device(batch["inputs"], self.device))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _needs_head(self, name: str) -> bool:
        settings = self.tasks[name].settings
        return settings.kind == "classification" and settings.head == "trained" and self.heads.get(name) is None


class Batches:
    """The first rows of a split in batches, without labels, as often as they are gone through."""

    def __init__(self, name: str, task: Task, split: str, size: int, limit: int | None) -> None:
        self._name, self._task, self._size = name, task, size
        self._rows = task.rows(split)
        self._count = len(self._rows) if limit is None else min(limit, len(self._rows))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, self._count, self._size):
            rows = [self._rows[i] for i in range(start, min(start + self._size, self._count))]
            yield {"task": self._name, "inputs": self._task.inputs(rows)}
