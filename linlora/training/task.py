"""A task: the rows of a data set, and how a model is trained and scored on them. One subclass for each kind."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linlora.training.data import (
    SPLITS,
    has_test,
    load_split,
    notes_on_files,
    notes_on_lines,
    notes_on_sharing,
    source_of,
)
from linlora.training.labels import Classes, check_labels, distinct, number_of, numbered_as
from linlora.training.metrics import METRICS, class_scores, number_scores, text_scores
from linlora.training.settings import Settings

Row = Mapping[str, Any]
IGNORED = -100  # labels that are not predicted


class Task(ABC):
    """A task, as `linlora.training.load_task` makes it from settings. Rows are read when they are first asked for.

    Attributes:
        settings: what it was made from.
        answer: what is predicted: "classes", "numbers" or "text".
        auto: the transformers class that the base model is read by.
        classes: those of the label column, where the answers are such.
        task_type: what PEFT calls the kind of model, or None.
        notes: of each split that was checked, what is odd in its rows and what is cut of them.
    """

    answer: str
    auto: Any
    classes: Classes | None = None
    task_type: str | None = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._splits: dict[str, Any] = {}
        self.notes: dict[str, list[str]] = {}

    @property
    def metric(self) -> str:
        """The name of the number the task is judged by."""
        return self.settings.metric or METRICS[self.answer][0]

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, that of the labels last."""

    def rows(self, split: str) -> Any:
        """The rows of a split, a `datasets.Dataset`, with the columns that are read."""
        if split not in self._splits:
            rows = load_split(self.settings.data, split, self.columns)
            if split != "train":
                with self._named(split):
                    rows = numbered_as(self.rows("train"), rows, self.settings.data.label)
            self._splits[split] = rows
        return self._splits[split]

    def check(self, split: str) -> None:
        """Raise a ValueError for rows of a split that this task cannot be trained or scored on: labels and lengths."""
        if split in self.notes:
            return
        rows, column = self.rows(split), self.settings.data.label
        labels = rows.select_columns([column])
        with self._named(split):
            check_labels(labels, column)
            for value in distinct(labels, column):
                self.expected({column: value})
            data = self.settings.data
            notes = [*notes_on_sharing(data, split), *notes_on_files(data, split), *notes_on_lines(data, split, rows)]
            if column in self.columns[:-1]:
                notes.append(f"column '{column}' is the answer, and given to the model too")
            self.notes[split] = notes + self.check_lengths(rows)

    @contextmanager
    def _named(self, split: str) -> Iterator[None]:
        """Name the split and its place in an error of its rows."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"the {split} split, {source_of(self.settings.data, split)}: {error}") from None

    def check_lengths(self, rows: Any) -> list[str]:
        """Raise a ValueError for rows that the model has no room for; what is cut of the others, in words."""
        return []

    def labels_in_words(self) -> str:
        """Describes the labels, for the introduction of a run."""
        if self.classes is not None:
            return f"{self.class_count} classes, {listed(self.classes.names)}"
        found = distinct(self.rows("train"), self.settings.data.label)
        return f"numbers from {min(found)} to {max(found)}"

    @functools.cached_property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are. A test split that is merely found counts if its rows can be scored."""
        if not has_test(self.settings.data):
            return SPLITS[:2]
        if self.settings.data.test is None:
            try:
                self.check("test")
            except ValueError as error:
                self.notes["note"] = [f"a test split was found and is left out: {error}"]
                return SPLITS[:2]
        return SPLITS

    @abstractmethod
    def base_model(self) -> nn.Module:
        """A new frozen model, as the checkpoint has it, with a head for this task."""

    def head_modules(self, model: nn.Module) -> tuple[str, ...]:
        """The head of a base model, where the kind of task has one to train."""
        return ()

    def trained_modules(self, base: nn.Module) -> list[str]:
        """The modules that train beside the adapter as a whole: a head, and those that `lora.modules_to_save` names."""
        head = self.head_modules(base) if self.settings.head == "trained" else ()
        return sorted({*(self.settings.lora.get("modules_to_save") or ()), *head})

    @abstractmethod
    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The inputs of the model for some rows; their labels are not looked at."""

    def batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The inputs and labels of some rows, to train on."""
        dtype = torch.long if self.answer == "classes" else torch.float32
        labels = torch.tensor([self.expected(row) for row in rows], dtype=dtype)
        if self.answer == "numbers":  # the number -100 is a label, which the Trainer would not count
            labels = torch.where(labels == IGNORED, IGNORED - 1e-5, labels)
        return {**self.inputs(rows), "labels": labels}

    @abstractmethod
    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits of the classes, (rows, classes)."""

    @abstractmethod
    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Any]:
        """The answers of the model: class indices, numbers or texts."""

    def expected(self, row: Row) -> Any:
        """The right answer of a row: the index of a class, a number or a text."""
        column = self.settings.data.label
        if self.classes is not None:
            return self.classes.index(row[column])
        return number_of(row[column], column) if self.answer == "numbers" else str(row[column])

    @property
    def class_count(self) -> int:
        """How many classes there are; 0 where the answers are none."""
        return 0 if self.classes is None else len(self.classes.names)

    def scores(self, predicted: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
        """The scores of predictions, "score" being that of `metric`."""
        if self.answer == "classes":
            scores = class_scores(predicted, expected, self.class_count)
        else:
            scores = (number_scores if self.answer == "numbers" else text_scores)(predicted, expected)
        return {"score": scores[self.metric], **scores}

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of what a model returned: cross-entropy, or squared error of numbers.

        The mean over all that is predicted in the batch; with `num_items_in_batch`, as the Trainer calls it, the share
        of this batch in the mean over all batches of a step, accumulated ones and those of other processes.
        """
        logits, labels = self.scored(outputs, labels)
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        if labels.is_floating_point():
            return nn.functional.mse_loss(logits.float().squeeze(-1), labels, reduction="sum") / count
        smoothing = float(self.settings.training.get("label_smoothing_factor", 0.0))
        options: dict[str, Any] = {"reduction": "sum", "ignore_index": IGNORED, "label_smoothing": smoothing}
        return nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), **options) / count

    def scored(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of a model's outputs, and the label of each."""
        return outputs.logits, labels

    def enter(self, model: nn.Module) -> bool:
        """Put a frozen head of the task's own into a model of `base_model`; False where there is none."""
        return False

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The mean loss of a model on a batch with labels."""
        self.enter(model)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return self.loss(model(**inputs), batch["labels"])


def listed(names: Sequence[Any]) -> str:
    """The first of some values.

    >>> listed(["no", "yes"]), listed(range(9))
    ("'no', 'yes'", '0, 1, 2, 3, 4, ...')
    """
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def images_of(rows: Sequence[Row], column: str) -> list[Any]:
    """The images of some rows, in three channels."""
    try:
        return [row[column].convert("RGB") for row in rows]
    except AttributeError:
        raise ValueError(
            f"column '{column}' holds {type(rows[0][column]).__name__}, not images; name the column of the images in "
            "data.image"
        ) from None
