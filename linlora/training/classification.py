"""Classification of texts or images by a head, trained beside the adapter or frozen; numbers where labels are such."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import transformers
from torch import Tensor, nn

from linlora.training.checkpoints import (
    check_kind,
    config_of,
    image_processor_of,
    load_model,
    refuse_new,
    tokenizer_of,
)
from linlora.training.labels import check_labels, classes_of, is_number
from linlora.training.positions import positions, token_counts
from linlora.training.settings import Settings
from linlora.training.task import Row, Task, images_of, listed


class Classification(Task):
    """A head over the classes of the label column; one output, trained by squared error, where that holds numbers."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        data = settings.data
        train = self.rows("train")
        self.config = config_of(settings)
        if data.image:
            self.auto = transformers.AutoModelForImageClassification
            mapping, what = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, "image classification"
        else:
            self.auto = transformers.AutoModelForSequenceClassification
            mapping, what = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "text classification"
        check_kind(settings, self.config, mapping, what)
        if data.image:
            self.processor = image_processor_of(settings)
        else:
            self.tokenizer = tokenizer_of(settings)
            limit = positions(settings, self.auto, self.config)["encoder"]
            self.max_length = min(settings.max_length, limit or settings.max_length)
        check_labels(train, data.label)
        self.answer = "numbers" if is_number(train, data.label) and not settings.class_names else "classes"
        self.classes = None if self.answer == "numbers" else classes_of(train, data.label, settings.class_names)
        if self.classes is not None and settings.head == "frozen":
            self.classes = self.classes.ordered_as(self._head_names)
        if settings.head == "trained" and data.text:
            self.task_type = "SEQ_CLS"

    @property
    def columns(self) -> tuple[str, ...]:
        data = self.settings.data
        return (*data.text, *([data.image] if data.image else []), data.label)

    def base_model(self) -> nn.Module:
        settings, trained = self.settings, self.settings.head == "trained"
        model, new = load_model(settings, self.auto, **(self._head_options() if trained else {}))
        if trained:
            beside = settings.lora.get("modules_to_save") or ()
            refuse_new(settings, new, (*self.head_modules(model), *beside), "; name it in lora.modules_to_save")
        else:
            refuse_new(settings, new, remedy=": it has no trained head; set head: trained")
        if model.config.num_labels != (count := self.class_count or 1):
            raise ValueError(
                f"model '{settings.model}' has a head of {model.config.num_labels} classes, column "
                f"'{settings.data.label}' has {count}; set head: trained"
            )
        if settings.data.text:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def head_modules(self, model: nn.Module) -> tuple[str, ...]:
        base = getattr(model, "base_model_prefix", "")
        children = dict(model.named_children())
        if base not in children:
            raise ValueError(
                f"{type(model).__name__} keeps its head among its layers ({', '.join(children)}); set head: frozen, or "
                "lora: {modules_to_save: [...]} with head: frozen"
            )
        return tuple(
            name for name, module in children.items() if name != base and any(True for _ in module.parameters())
        )

    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        data = self.settings.data
        if data.image:
            return dict(self.processor(images=images_of(rows, data.image), return_tensors="pt"))
        options = {"padding": True, "truncation": True, "max_length": self.max_length}
        return dict(self.tokenizer(*self._texts(rows), **options, return_tensors="pt"))

    def check_lengths(self, rows: Any) -> list[str]:
        if self.settings.data.image:
            return []
        counts = token_counts(self.tokenizer, *self._texts(rows.select_columns(list(self.settings.data.text))))
        if not min(counts):
            raise ValueError(f"{counts.count(0)} texts are without a token of {self.settings.model}")
        long = sum(count > self.max_length for count in counts)
        return [f"{long} of {len(counts)} texts are longer than {self.max_length} tokens and cut"] if long else []

    def _texts(self, rows: Iterable[Row]) -> list[list[str]]:
        """The texts of some rows, by column."""
        of_rows = [[str(row[column]) for column in self.settings.data.text] for row in rows]
        return [list(of_column) for of_column in zip(*of_rows, strict=True)]

    def labels_in_words(self) -> str:
        words = super().labels_in_words()
        if self.classes is None:
            return f"{words}, predicted by one output; for classes write them without a fraction, or set class_names"
        return words + (f"; the head has {listed(self._head_names)}" if self.settings.head == "frozen" else "")

    @property
    def _head_names(self) -> list[str]:
        """The classes of the checkpoint's own head, LABEL_0, LABEL_1, ... where nobody named them."""
        return [name for _, name in sorted(self.config.id2label.items())]

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(**inputs).logits

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Any]:
        logits = self.logits(model, inputs)
        return (logits.argmax(-1) if self.classes is not None else logits.float().squeeze(-1)).tolist()

    def _head_options(self) -> dict[str, Any]:
        if self.classes is None:
            return {"num_labels": 1, "problem_type": "regression", "ignore_mismatched_sizes": True}
        names = self.classes.names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,
        }
