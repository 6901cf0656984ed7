"""Settings of a training run: a frozen dataclass that a YAML file or flags fill, checked before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from linlora.training import plain_yaml
from linlora.training.sections import LORA, OPTIONS, TRAINING
from linlora.training.setting import TEXT, TEXTS, Values, check, check_keys, is_real, one_of, whole

FAMILIES = ("lora", "lora-fa", "layer", "model")
# Where `training.learning_rate` is left out. The rates that validated best on the quickstart's digits, of one grid for
# all methods, were one and the same for LoRA and layer scope, and twice that for model scope.
LEARNING_RATES = {"lora": 3e-4, "lora-fa": 3e-4, "layer": 3e-4, "model": 6e-4}


def _is_held_out(value: Any) -> bool:
    return isinstance(value, str) or (is_real(value) and (0 < value < 1 or (value >= 1 and value == int(value))))


_SPLIT_OR_ROWS = Values("a split, a file, or how many rows of train are held out (0.1: a tenth)", _is_held_out)
_SPLIT_OR_FALSE = Values("a split, a file or false", lambda v: v is False or isinstance(v, str))


@dataclass(frozen=True)
class Data:
    """Where the rows come from and which of their columns are used.

    Attributes:
        path: a data set on the hub, a folder that `datasets.load_dataset` reads (csv, json, parquet, or a folder of
            images), or a csv, tsv, json, jsonl or parquet file.
        config: the configuration of a data set that has several.
        train: a split, also a slice of one ("train[:80%]"), or a file.
        validation: a split, a file, or how many rows of train, a fraction or a number, are held out for it.
        test: a split or file; a split of that name that is found, if left out; false: nothing is tested.
        prototypes: a split or file of the examples that make prototypes (`head: prototypes`); train if left out.
        text: the columns of a classified text, one or two.
        image: the column of an image.
        label: the column of the class (its name or index), of the number, or of the answer.
    """

    path: Annotated[str | None, TEXT] = None
    config: Annotated[str | None, TEXT] = None
    train: Annotated[str, TEXT] = "train"
    validation: Annotated[str | float, _SPLIT_OR_ROWS] = "validation"
    test: Annotated[str | bool | None, _SPLIT_OR_FALSE] = None
    prototypes: Annotated[str | None, TEXT] = None
    text: Annotated[tuple[str, ...], TEXTS] = ()
    image: Annotated[str | None, TEXT] = None
    label: Annotated[str, TEXT] = "label"

    def __post_init__(self) -> None:
        if is_real(self.test):
            raise ValueError(
                f"data.test is {_SPLIT_OR_FALSE.words}, got {self.test!r}; to hold rows out of train: "
                "data.train 'train[:80%]' data.test 'train[80%:]'"
            )
        check(self, "data.")


def _data(content: Any) -> Data:
    if isinstance(content, Data):
        return content
    check_keys("data", content, Data)
    return Data(**content)


def _rates(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


_DATA = Values("a section (path, train, label, ...)", lambda v: isinstance(v, (Data, Mapping)), read=_data)
_GRID = Values(
    "a list of learning rates above 0",
    lambda v: all(is_real(rate) and rate > 0 for rate in _rates(v)),
    list[float],
    lambda v: tuple(sorted({float(rate) for rate in _rates(v)})),
)


@dataclass(frozen=True)
class Settings:
    """One training run.

    Attributes:
        model: a transformers checkpoint, by its id on the hub or its folder.
        kind: "classification" of texts or images by a head, "text-to-text" with a prompt and an answer, or "zero-shot"
            with CLIP, whose text tower builds the classes and whose image tower is adapted.
        data: see `Data`.
        out: the folder of the run; of many tasks, the folder of theirs. runs/NAME if left out.
        name: of the task. If left out, the last part of `out`, or what the data are called. It changes no result.
        method: "lora", "lora-fa" (A frozen), or the scope of the linearization, "layer" or "model".
        head: of a classifier: "trained" beside the adapter; "frozen", as the checkpoint has it; or "prototypes", the
            means of each class's features before training, which go with an encoder without a head.
        linear_to: where the function ends that is linearized at model scope: at the "scores", which is what a frozen
            head, prototypes and zero-shot do unless told otherwise, or at the "features", which a head that is trained
            as a whole is applied to. Prototypes and zero-shot can do both (linlora.training.similarity).
        prompt: of text-to-text, with the columns in braces: "{premise} Does it follow that {hypothesis}?"
        answers: the words of the classes 0, 1, ... for text-to-text. Without them an answer is the label column itself.
        class_names: in the order of the classes; the data set's own where it has them.
        templates: of zero-shot: sentences around a class name, which stands for {}.
        metric: the number a run is judged by; see `linlora.training.metrics`.
        max_length: tokens of a text or prompt; what is longer is cut.
        max_new_tokens: tokens of an answer, which is written greedily.
        point: start from this linearization point: a task vector file, or a folder that holds one. Vectors of several
            tasks add if their runs start from one point; those of one model, seed and LoRA settings do.
        seed: of the adapter, a new head, and the order of the rows.
        lr_grid: learning rates to try: the one that scores best on the validation split makes the run.
        lora: fields of `peft.LoraConfig`: r, lora_alpha (2 r), lora_dropout, target_modules, use_rslora, ...
        training: fields of `transformers.TrainingArguments`. learning_rate is the method's own where it is
            left out. report_to: tensorboard, wandb or another, which has to be installed.
        model_options: keyword arguments of the model's `from_pretrained`: dtype, revision, attn_implementation, ...

    >>> settings = Settings("bert-base-uncased", "classification", Data("reviews.csv", text=("review",)))
    >>> settings.name, settings.out, settings.lora["r"]
    ('reviews', 'runs/reviews', 16)
    >>> Settings.from_dict({**settings.to_dict(), "metod": "layer"})
    Traceback (most recent call last):
    ValueError: settings: unknown key 'metod'; did you mean 'method'?
    """

    model: Annotated[str, TEXT]
    kind: Annotated[str, one_of("classification", "text-to-text", "zero-shot")]
    data: Annotated[Data, _DATA]
    out: Annotated[str, TEXT] = ""
    name: Annotated[str, TEXT] = ""
    method: Annotated[str, one_of(*FAMILIES)] = "layer"
    head: Annotated[str, one_of("trained", "frozen", "prototypes")] = "trained"
    linear_to: Annotated[str, one_of("scores", "features", unset=("",))] = ""
    prompt: Annotated[str | None, TEXT] = None
    answers: Annotated[tuple[str, ...], TEXTS] = ()
    class_names: Annotated[tuple[str, ...], TEXTS] = ()
    templates: Annotated[tuple[str, ...], TEXTS] = ("a photo of a {}.",)
    metric: Annotated[str | None, TEXT] = None
    max_length: Annotated[int, whole(1)] = 512
    max_new_tokens: Annotated[int, whole(1)] = 16
    point: Annotated[str | None, TEXT] = None
    seed: Annotated[int, whole(0, 2**32, " and below 2^32")] = 0
    lr_grid: Annotated[tuple[float, ...], _GRID] = ()
    lora: Annotated[Mapping[str, Any], LORA] = field(default_factory=dict)
    training: Annotated[Mapping[str, Any], TRAINING] = field(default_factory=dict)
    model_options: Annotated[Mapping[str, Any], OPTIONS] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)
        self._check_kind()
        self._check_end()
        of_data = self.data.config or Path(self.data.path or self.data.train).stem
        name = self.name or (self.out and Path(os.path.abspath(self.out)).name) or of_data
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "out", self.out or f"runs/{name}")

    def _check_kind(self) -> None:
        data = self.data
        if data.path is None and "." not in data.train:
            raise ValueError("data.path is missing: name a data set on the hub, a folder or a file")
        what, given = {
            "classification": ("one of the two, data.text or data.image", bool(data.text) != bool(data.image)),
            "text-to-text": ("prompt", bool(self.prompt)),
            "zero-shot": ("data.image", bool(data.image)),
        }[self.kind]
        if not given:
            raise ValueError(f"kind '{self.kind}' needs {what}")
        if len(data.text) > 2:
            raise ValueError(f"data.text: a text of one or two columns is classified, got {list(data.text)}")
        if self.kind == "zero-shot" and not (self.templates and all("{}" in template for template in self.templates)):
            raise ValueError(f"templates: each needs a {{}} for the class name, got {list(self.templates)}")

    @property
    def ends_at(self) -> str:
        """`linear_to`, or what is usual for the kind and head."""
        return self.linear_to or ("features" if self._trains_head else "scores")

    @property
    def _trains_head(self) -> bool:
        return self.kind == "classification" and self.head == "trained"

    def _check_end(self) -> None:
        both = self.kind == "zero-shot" or (self.kind == "classification" and self.head == "prototypes")
        if not both and self.linear_to == ("scores" if self._trains_head else "features"):
            what = f"a {self.head} head" if self.kind == "classification" else f"kind '{self.kind}'"
            raise ValueError(
                f"linear_to: the {self.linear_to} are not where the function of {what} ends; with head: prototypes "
                "they can be"
            )

    @property
    def learning_rate(self) -> float:
        """That of `training`, or the method's."""
        return float(self.training.get("learning_rate", LEARNING_RATES[self.method]))

    @property
    def device(self) -> str:
        """Where a model of these settings is evaluated: "cuda" or "cpu"."""
        import torch

        return "cuda" if torch.cuda.is_available() and not self.training.get("use_cpu") else "cpu"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "settings") -> Settings:
        """Settings from plain values, as YAML gives them; an unknown key is an error with the nearest, or all."""
        check_keys(where, content, cls)
        content = {**content, "data": content.get("data") or {}}
        for key in ("model", "kind"):
            if content.get(key) is None:
                raise ValueError(f"{where}: {key} is missing")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Settings:
        """Read the file of one task; `linlora.training.recipe` reads those of many."""
        return cls.from_dict(plain_yaml.read(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `from_dict` takes."""
        return json.loads(json.dumps(asdict(self)))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The YAML text, also written to `path` where one is given.

        >>> settings = Settings("gpt2", "text-to-text", Data("tasks.jsonl"), prompt="{question}")
        >>> Settings.from_dict(plain_yaml.parse(settings.to_yaml())) == settings
        True
        """
        from linlora.storage.files import write_text

        text = plain_yaml.dump(self.to_dict())
        if path is not None:
            write_text(path, text)
        return text

    def changed(self, **changes: Any) -> Settings:
        """The same settings but for some fields. Sections are merged: changed(training={"max_steps": 10})."""
        sections: dict[str, Any] = {
            key: {**getattr(self, key), **changes.pop(key)}
            for key in ("lora", "training", "model_options")
            if key in changes
        }
        return replace(self, **sections, **changes)

    def differences(self, other: Settings) -> list[str]:
        """The fields, with both values, in which other settings differ, but for the folder and the name.

        >>> settings = Settings("gpt2", "text-to-text", Data("tasks.jsonl"), prompt="{question}")
        >>> settings.differences(settings.changed(seed=1, out="elsewhere", name="other"))
        ['seed: 0 and 1']
        """
        mine, others = flat(self.to_dict()), flat(other.to_dict())
        return [
            f"{key}: {mine.get(key)} and {others.get(key)}"
            for key in sorted(mine.keys() | others.keys())
            if key not in ("out", "name") and mine.get(key) != others.get(key)
        ]


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted keys.

    >>> flat({"seed": 0, "lora": {"r": 8}})
    {'seed': 0, 'lora.r': 8}
    """
    keys: dict[str, Any] = {}
    for key, value in content.items():
        keys.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return keys
