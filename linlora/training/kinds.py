"""The kinds of task, and `load_task`, which makes one from its settings."""

from __future__ import annotations

from linlora.training.classification import Classification
from linlora.training.metrics import check_metric
from linlora.training.prototypes import Prototypes
from linlora.training.settings import Settings
from linlora.training.task import Task
from linlora.training.text_to_text import TextToText
from linlora.training.zero_shot import ZeroShot

_KINDS: dict[str, type[Task]] = {
    "classification": Classification,
    "text-to-text": TextToText,
    "zero-shot": ZeroShot,
}


def load_task(settings: Settings) -> Task:
    """The task of some settings. Its train split is read; `Task.check` checks the labels of a split."""
    kind = Prototypes if settings.kind == "classification" and settings.head == "prototypes" else _KINDS[settings.kind]
    task = kind(settings)
    check_metric(task.metric, task.answer)
    return task


def checked_task(settings: Settings) -> Task:
    """The task of some settings, with the rows of all its splits checked."""
    task = load_task(settings)
    for split in task.splits:
        task.check(split)
    return task
