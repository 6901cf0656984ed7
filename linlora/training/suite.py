"""Several tasks on one model: `TaskSet` scores any model, `Suite` has one that task vectors are put into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from linlora.layers.temporary import evaluating
from linlora.training.adapted import adapt, model_for
from linlora.training.evaluation import arithmetic, evaluate, in_order, on_device
from linlora.training.head import set_head
from linlora.training.settings import Settings
from linlora.training.task import Row, Task
from linlora.vectors.task_vector import TaskVector, apply
from linlora.vectors.weight_vector import WeightVector

_SHARED = ("model", "kind", "head", "linear_to", "lora.", "model_options.")


def different_models(one: Settings, other: Settings, *more: str) -> list[str]:
    """The settings, and those that `more` names, which differ though tasks of one model have to share them."""
    return [difference for difference in one.differences(other) if difference.startswith((*_SHARED, *more))]


class TaskSet:
    """Tasks whose heads are put into a model, plain or a PeftModel with any vector in it, when a task is asked.

    Args:
        tasks: by name; they share a model.
        heads: of the tasks whose head was trained (`Run.head`).
        trained_modules: of the base model, trained beside the adapters: the heads.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        heads: Mapping[str, Mapping[str, Tensor] | None],
        trained_modules: Sequence[str] = (),
    ) -> None:
        self.tasks, self.heads, self.trained_modules = dict(tasks), dict(heads), tuple(trained_modules)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tasks)

    def enter(self, model: nn.Module, name: str) -> Task:
        """Put the head of a task into a model."""
        if (head := self.heads.get(name)) is not None:
            set_head(model, head)
        return self.tasks[name]

    def evaluate(
        self, model: nn.Module, split: str, limit: int | None = None, progress: bool = False
    ) -> dict[str, dict[str, float]]:
        """The scores of each task, as `linlora.training.evaluate` returns them."""
        return {name: evaluate(model, self.enter(model, name), split, limit, progress) for name in self.tasks}

    def scores(self, model: nn.Module, split: str) -> list[float]:
        """The score of each task."""
        return [scores["score"] for scores in self.evaluate(model, split).values()]

    def unlabeled(self, size: int, split: str = "validation", limit: int | None = 256) -> list[DataLoader[Any]]:
        """For each task its batches without labels, {"task", "inputs"}; `logits` takes them.

        Where rows are limited, the same ones are drawn every time.
        """
        return [self._batches(name, split, size, limit, labels=False) for name in self.tasks]

    def labeled(self, size: int, limit: int, split: str = "validation") -> list[DataLoader[Any]]:
        """The same with labels, {"task", "inputs", "labels"}; `loss` takes them."""
        return [self._batches(name, split, size, limit, labels=True) for name in self.tasks]

    def _batches(self, name: str, split: str, size: int, limit: int | None, labels: bool) -> DataLoader[Any]:
        task = self.tasks[name]

        def collate(rows: Sequence[Row]) -> dict[str, Any]:
            inputs = task.batch(rows) if labels else task.inputs(rows)
            return {"task": name, "inputs": inputs} | ({"labels": inputs.pop("labels")} if labels else {})

        rows = task.rows(split)
        if limit is not None and limit < len(rows):  # the first rows of a file are often of one class
            drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:limit]
            rows = rows.select(drawn.tolist())
        return in_order(rows, size, collate)

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The logits of a batch, of the classes of its task."""
        task, device = self.enter(model, batch["task"]), next(model.parameters()).device
        with arithmetic(task, device):
            return task.logits(model, on_device(batch["inputs"], device))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The mean loss on a labeled batch."""
        task, device = self.enter(model, batch["task"]), next(model.parameters()).device
        with evaluating(model), arithmetic(task, device):
            return task.batch_loss(model, on_device({**batch["inputs"], "labels": batch["labels"]}, device))


class Suite(TaskSet):
    """Tasks, and one model for all vectors of a linearization point, or of weight space.

    Args:
        tasks: by name; they share model, kind and LoRA settings.
        like: a vector of the point and scope the model is put at; in weight space, of the layers and ranks it holds.
        heads: of the tasks whose head was trained (`Run.head`).

    Raises ValueError for tasks of different models or LoRA settings, or a trained head that is missing.
    """

    def __init__(
        self, tasks: Mapping[str, Task], like: TaskVector, heads: Mapping[str, Mapping[str, Tensor] | None]
    ) -> None:
        super().__init__(tasks, heads)
        self._first = first = next(iter(tasks.values()))
        for name, task in tasks.items():
            if odd := different_models(first.settings, task.settings):
                raise ValueError(f"tasks '{first.settings.name}' and '{name}' do not share one model: {'; '.join(odd)}")
            settings = task.settings
            if settings.kind == "classification" and settings.head == "trained" and heads.get(name) is None:
                raise ValueError(f"task '{name}' has a head that was trained; name the folder of its run")
        if isinstance(like, WeightVector):
            base = first.base_model()
            model = model_for(base, like, first.trained_modules(base), first.task_type)
        else:
            model = adapt(first, like if like.point is not None else None, method=like.scope).model
        self.model = model.to(self.device)

    @property
    def device(self) -> str:
        return self._first.settings.device

    def base(self) -> nn.Module:
        """The plain model, read anew."""
        return self._first.base_model().to(self.device).requires_grad_(False)

    def put(self, vector: TaskVector) -> None:
        """Put a vector into the model."""
        apply(self.model, vector)
