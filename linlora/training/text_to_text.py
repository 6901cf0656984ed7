"""Text-to-text: a prompt made of the columns of a row, and an answer the model writes. Encoder-decoder or causal."""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from linlora.layers.sharding import is_sharded
from linlora.training.answers import match, normalized, number
from linlora.training.checkpoints import check_kind, config_of, load_model, refuse_new, tokenizer_of
from linlora.training.labels import check_labels, classes_of, distinct, is_number
from linlora.training.positions import positions, token_counts
from linlora.training.settings import Settings
from linlora.training.task import IGNORED, Row, Task, listed


class TextToText(Task):
    """The answer is one of some words (`answers`, or classes by name), a number written with one decimal, or free."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.config = config_of(settings)
        self.causal = not self.config.is_encoder_decoder
        if self.causal:
            self.auto, mapping = transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        else:
            self.auto = transformers.AutoModelForSeq2SeqLM
            mapping = transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        check_kind(settings, self.config, mapping, "text-generating")
        self.task_type = "CAUSAL_LM" if self.causal else "SEQ_2_SEQ_LM"
        self.tokenizer = tokenizer_of(settings)
        self._collate = transformers.DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        self._positions = positions(settings, self.auto, self.config)
        train, label = self.rows("train"), settings.data.label
        check_labels(train, label)
        if settings.answers or hasattr(train.features[label], "names"):
            self.answer, self.classes = "classes", classes_of(train, label, settings.answers)
            _check_told_apart(self.classes.names)
        else:
            self.answer = "numbers" if is_number(train, label) else "text"

    @property
    def columns(self) -> tuple[str, ...]:
        return (*_fields(str(self.settings.prompt)), self.settings.data.label)

    def base_model(self) -> nn.Module:
        model, new = load_model(self.settings, self.auto)
        refuse_new(self.settings, new)
        own = model.generation_config.to_dict()  # its tokens stay; no penalty, least length or sampling of it does
        tokens = {name: own[name] for name in own if name.endswith("_token_id")}
        model.generation_config = transformers.GenerationConfig(**tokens)
        return model

    def prompt(self, row: Row) -> str:
        try:
            return str(self.settings.prompt).format_map(row)
        except ValueError as error:
            raise ValueError(f"prompt {self.settings.prompt!r} does not fit a row: {error}") from None

    def answer_text(self, row: Row) -> str:
        """The answer as the model is to write it."""
        expected = self.expected(row)
        if self.classes is not None:
            return self.classes.names[expected]
        return f"{expected:.1f}" if self.answer == "numbers" else expected

    @functools.cached_property
    def _no_number(self) -> float:
        """What a text without a number counts as: less than every label."""
        return min(distinct(self.rows("train"), self.settings.data.label)) - 1.0

    def labels_in_words(self) -> str:
        if self.classes is not None:
            return f"{self.class_count} classes, the words {listed(self.classes.names)}"
        if self.answer == "numbers":
            return f"{super().labels_in_words()}, written with one decimal"
        return f"text, {listed(list(map(str, distinct(self.rows('train'), self.settings.data.label))))}"

    def check_lengths(self, rows: Any) -> list[str]:
        prompts = token_counts(self.tokenizer, [self.prompt(row) for row in rows])
        answers = [len(self._answer_ids(self.answer_text(row))) for row in rows]
        for what, counts in (("prompts", prompts), ("answers", answers)):
            if not min(counts):
                raise ValueError(f"{counts.count(0)} {what} are without a token of {self.settings.model}")
        self._check_room(max(prompts), max(answers))
        notes = []
        for what, counts, limit, happens in (
            ("prompts", prompts, self.settings.max_length, "tokens (max_length), and cut"),
            ("answers", answers, self.settings.max_new_tokens, "tokens (max_new_tokens), which is all a model writes"),
        ):
            if long := sum(count > limit for count in counts):
                notes.append(f"{long} of {len(counts)} {what} are longer than {limit} {happens}")
        return notes

    def _check_room(self, prompt: int, answer: int) -> None:
        """Raise a ValueError where the model has no positions for the longest prompt and the longest answer."""
        settings = self.settings
        prompt, written = min(prompt, settings.max_length), max(answer, settings.max_new_tokens)
        if not self.causal and answer > settings.max_length:
            raise ValueError(f"an answer has {answer} tokens, and max_length is {settings.max_length}")
        takes, gives = (self._positions[side] or math.inf for side in ("encoder", "decoder"))
        if self.causal:
            takes, gives = takes - written, gives - 1
        if written <= gives and prompt <= takes:
            return
        shorter = f", or set max_new_tokens ({written} now)" if written > answer else ""
        has = (
            f"model '{settings.model}' has {gives + self.causal if written > gives or self.causal else takes} positions"
        )
        if written > gives:
            raise ValueError(f"{has}, too few for an answer of {written} tokens; shorten the answers{shorter}")
        more = f" and an answer of {written}" if self.causal else ""
        raise ValueError(
            f"{has}, too few for a prompt of {prompt} tokens{more}; shorten the prompts, cut them with max_length: "
            f"{takes}{shorter if self.causal else ''}"
        )

    def inputs(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self._tokens([self.prompt(row) for row in rows], side="left" if self.causal else "right")

    def batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        answers = [self.answer_text(row) for row in rows]
        if not self.causal:
            tokens = self._tokens(answers, side="right")
            labels = tokens["input_ids"]
            start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            return {
                **self.inputs(rows),
                "decoder_input_ids": torch.cat([start, labels[:, :-1]], dim=1),  # each token from those before it
                "labels": labels.masked_fill(tokens["attention_mask"] == 0, IGNORED),
            }
        options = {"truncation": True, "max_length": self.settings.max_length}
        asked = [self.tokenizer(self.prompt(row), **options)["input_ids"] for row in rows]
        written = [self._answer_ids(answer) for answer in answers]
        pairs = zip(asked, written, strict=True)
        return dict(self._collate([{"input_ids": p + a, "labels": [IGNORED] * len(p) + a} for p, a in pairs]))

    def scored(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.causal:  # each token from those before it
            return outputs.logits[:, :-1], labels[:, 1:]
        return outputs.logits, labels

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits of the first token of the answer, over the vocabulary."""
        if self.causal:
            lengths = inputs["attention_mask"].sum(1)  # padded behind instead: models count positions from the start
            turned = {
                name: torch.stack([row.roll(int(n)) for row, n in zip(tokens, lengths, strict=True)])
                for name, tokens in inputs.items()
            }
            return model(**turned).logits[torch.arange(len(lengths), device=lengths.device), lengths - 1]
        start = torch.full_like(inputs["input_ids"][:, :1], self.config.decoder_start_token_id)
        return model(**inputs, decoder_input_ids=start).logits[:, -1]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Any]:
        options: dict[str, Any] = {"max_new_tokens": self.settings.max_new_tokens, "do_sample": False, "num_beams": 1}
        options["synced_gpus"] = is_sharded(model)  # then every process has to take as many steps
        generator: Any = model
        own = generator.generation_config.eos_token_id  # answers are trained to end by the tokenizer's
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        options["eos_token_id"] = sorted(ends) or None
        tokens = generator.generate(**inputs, **options, pad_token_id=self.tokenizer.pad_token_id)
        if self.causal:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [self.read(text) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def read(self, text: str) -> Any:
        """The answer a generated text gives: a class index, a number or the text."""
        if self.classes is not None:
            return match(text, self.classes.names)
        if self.answer == "numbers":
            value = number(text)
            return self._no_number if value is None else value
        return text

    def _tokens(self, texts: list[str], side: str) -> dict[str, Any]:
        options = {"padding": True, "padding_side": side, "truncation": True, "max_length": self.settings.max_length}
        tokens = self.tokenizer(texts, **options, return_tensors="pt")
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def _answer_ids(self, answer: str) -> list[int]:
        """A space stands between prompt and answer; the end of text after the answer ends it."""
        ids = self.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        return ids + ([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])


def _check_told_apart(answers: Sequence[str]) -> None:
    """Raise a ValueError for answers that `match` does not tell apart, or never finds."""
    read: dict[str, str] = {"": "a text without words"}
    for answer in answers:
        if (other := read.setdefault(normalized(answer), repr(answer))) != repr(answer):
            raise ValueError(
                f"answers: {answer!r} is read as {other}, since case, white space and punctuation do not count; name "
                "other words"
            )


def _fields(prompt: str) -> tuple[str, ...]:
    """The columns a prompt names.

    >>> _fields("{premise} Does it follow that {hypothesis}?")
    ('premise', 'hypothesis')
    """
    try:
        found = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError as error:
        raise ValueError(f"prompt: {error}; write {{{{ for a brace that stands for itself") from None
    if not found or not all(name.isidentifier() for name in found):
        raise ValueError(f"prompt: name the columns of the data set in braces, as in {{question}}; got {prompt!r}")
    return tuple(found)
