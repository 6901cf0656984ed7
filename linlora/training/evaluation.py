"""Scores a model on a split of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from linlora.fusion.search import bar
from linlora.layers.temporary import evaluating
from linlora.training.task import Row, Task


def evaluate(
    model: nn.Module, task: Task, split: str = "validation", limit: int | None = None, progress: bool = True
) -> dict[str, float]:
    """The scores of a model on the rows of a split, in the arithmetic (bf16, fp16) the task is trained in.

    In a process group every process takes as many of the rows, some twice where they do not divide, so that sharded
    models stay in step; all return the scores of all rows.

    Args:
        model: a model of `adapt(task)`, with any task vector applied, or a plain one of the same outputs.
        limit: the first rows alone.
        progress: show a bar, where stderr is a terminal.

    Returns: "score", which is that of `task.metric`; every score of its kind of answer (`linlora.training.metrics`),
        as fractions; "rows"; and for answers in words "unanswered", the fraction that gave none.
    """
    task.check(split)
    rows = task.rows(split)
    count = len(rows) if limit is None else min(limit, len(rows))
    labels = rows.select(range(count)).select_columns([task.settings.data.label])  # decodes no image
    arguments = task.settings.training
    size = int(arguments.get("per_device_eval_batch_size", 0) or arguments["per_device_train_batch_size"])
    device = next(model.parameters()).device
    predicted: list[Any] = []
    with PartialState().split_between_processes(list(range(count)), apply_padding=True) as mine:
        workers = int(arguments.get("dataloader_num_workers", 0))
        batches: Any = in_order(rows.select(mine), size, task.inputs, workers=workers)
        with evaluating(model), torch.no_grad(), arithmetic(task, device):
            for inputs in bar(batches, f"evaluating {task.settings.name}", progress):
                predicted += task.predict(model, on_device(inputs, device))
    by_row = dict(gather_object(list(zip(mine, predicted, strict=True))))
    answers = [by_row[i] for i in range(count)]
    scores = task.scores(answers, [task.expected(row) for row in labels])
    if task.settings.kind == "text-to-text" and task.answer == "classes":
        scores["unanswered"] = sum(answer < 0 for answer in answers) / count
    return {**scores, "rows": count}


def in_order(rows: Any, size: int, collate: Callable[[Sequence[Row]], Any], workers: int = 0) -> DataLoader[Any]:
    """Batches of rows in their order. No random number is drawn from torch's own state."""
    return DataLoader(rows, size, collate_fn=collate, num_workers=workers, generator=torch.Generator())


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


@contextmanager
def arithmetic(task: Task, device: torch.device) -> Iterator[None]:
    """Autocast to what the training arguments say."""
    arguments = task.settings.training
    dtype = torch.bfloat16 if arguments.get("bf16") else torch.float16 if arguments.get("fp16") else None
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        yield
