"""Settings of a training run: a frozen dataclass that a YAML file or flags fill, checked before any work."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from linlora.training import plain_yaml

KINDS = ("classification", "text-to-text", "zero-shot")
FAMILIES = ("lora", "lora-fa", "layer", "model")
HEADS = ("trained", "frozen", "prototypes")
ENDS = ("scores", "features")
# Where `training.learning_rate` is left out. The rates that validated best on the quickstart's digits, of one grid for
# all methods, were one and the same for LoRA and layer scope, and twice that for model scope.
LEARNING_RATES = {"lora": 3e-4, "lora-fa": 3e-4, "layer": 3e-4, "model": 6e-4}

# TrainingArguments that `Settings` or `train` decide, with what to set instead.
_RESERVED = {
    "output_dir": "out",
    "seed": "seed",
    "resume_from_checkpoint": "nothing: a run continues in its folder by itself",
    "save_only_model": "nothing: a run continues from its checkpoints, which takes the optimizer's state",
    "remove_unused_columns": "nothing: the columns that are used are named under data",
    "label_names": "data.label",
    "do_train": "nothing", "do_eval": "nothing", "do_predict": "nothing",
    "push_to_hub": "nothing: upload the folder of the run when it is done",
}  # fmt: skip
_COUNTS = (
    "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
_RANK = 16
_TRAINING = {"per_device_train_batch_size": 16, "max_steps": 1000}


@dataclass(frozen=True)
class Data:
    """Where the rows come from and which of their columns are used.

    Attributes:
        path: a data set on the hub, a folder that `datasets.load_dataset` reads (csv, json, parquet, or a folder of
            images), or a csv, tsv, json, jsonl or parquet file.
        config: the configuration of a data set that has several.
        train: a split, also a slice of one ("train[:80%]"), or a file.
        test: the same; a split of that name that is found, if left out; false: nothing is tested.
        validation: the same; or how many rows of train, a fraction below 1 or a number, are held out for it.
        prototypes: the same, of the examples that make prototypes (`head: prototypes`); train if left out.
        text: the columns of a classified text, one or two. image: the column of an image.
        label: the column of the class (its name or index), of the number, or of the answer.
    """

    path: str | None = None
    config: str | None = None
    train: str = "train"
    validation: str | float = "validation"
    test: str | bool | None = None
    prototypes: str | None = None
    text: tuple[str, ...] = ()
    image: str | None = None
    label: str = "label"

    def __post_init__(self) -> None:
        _check_strings("data", self, ("path", "config", "prototypes", "image"), optional=True)
        if self.test is not None and self.test is not False and not isinstance(self.test, str):
            raise ValueError(f"data: 'test' is a split, a file or false, got {self.test!r}")
        _check_strings("data", self, ("train", "label"))
        _set(self, "text", _strings("data.text", self.text))
        held_out = self.validation
        if isinstance(held_out, bool) or not isinstance(held_out, (str, int, float)):
            raise ValueError(f"data.validation is a split, a fraction or a number of rows, got {held_out!r}")
        if not isinstance(held_out, str) and not (0 < held_out < 1 or (held_out >= 1 and held_out == int(held_out))):
            raise ValueError(
                f"data.validation: {held_out} is neither a fraction of train, above 0 and below 1, nor a number of rows"
            )


@dataclass(frozen=True)
class Settings:
    """One training run.

    Attributes:
        model: a transformers checkpoint, by its id on the hub or its folder.
        kind: "classification" of texts or images by a head, "text-to-text" with a prompt and an answer, or "zero-shot"
            with CLIP, whose text tower builds the classes and whose image tower is adapted.
        data: see `Data`.
        out: the folder of the run. name: of the task; both follow from the data where they are not given.
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
        max_length: tokens of a text or prompt; what is longer is cut. max_new_tokens: of an answer.
        point: start from this linearization point: a task vector file, or a folder that holds one. Vectors of several
            tasks add if their runs start from one point; those of one model, seed and LoRA settings do.
        seed: of the adapter, a new head, and the order of the rows.
        lr_grid: learning rates to try: the one that scores best on the validation split makes the run.
        lora: fields of `peft.LoraConfig`: r, lora_alpha (2 r), lora_dropout, target_modules, use_rslora, ...
        training: fields of `transformers.TrainingArguments`. learning_rate is that of LEARNING_RATES for the method
            where it is left out. report_to: tensorboard, wandb or another, which has to be installed.
        model_options: keyword arguments of the model's `from_pretrained`: dtype, revision, attn_implementation, ...

    >>> settings = Settings("bert-base-uncased", "classification", Data("reviews.csv", text=("review",)))
    >>> settings.name, settings.out, settings.lora["r"]
    ('reviews', 'runs/reviews', 16)
    >>> Settings.from_dict({**settings.to_dict(), "metod": "layer"})
    Traceback (most recent call last):
    ValueError: settings: unknown key 'metod'; did you mean 'method'? The keys are model, kind, data, out, name, \
method, head, linear_to, prompt, answers, class_names, templates, metric, max_length, max_new_tokens, point, seed, \
lr_grid, lora, training, model_options
    """

    model: str
    kind: str
    data: Data
    out: str = ""
    name: str = ""
    method: str = "layer"
    head: str = "trained"
    linear_to: str = ""
    prompt: str | None = None
    answers: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)
    metric: str | None = None
    max_length: int = 512
    max_new_tokens: int = 16
    point: str | None = None
    seed: int = 0
    lr_grid: tuple[float, ...] = ()
    lora: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_strings("settings", self, ("model", "kind", "out", "name", "method", "head", "linear_to"))
        _check_strings("settings", self, ("prompt", "metric", "point"), optional=True)
        for key in ("answers", "class_names", "templates"):
            _set(self, key, _strings(key, getattr(self, key)))
        for key in ("max_length", "max_new_tokens", "seed"):
            value = getattr(self, key)
            least = 0 if key == "seed" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32:
                raise ValueError(f"{key} is a whole number, {least} or more and below 2^32, got {value!r}")
        _choice("kind", self.kind, KINDS)
        _choice("method", self.method, FAMILIES)
        _choice("head", self.head, HEADS)
        self._check_kind()
        self._check_end()
        _set(self, "lr_grid", _rates(self.lr_grid))
        _set(self, "lora", _lora(self.lora))
        _set(self, "training", _training(self.training))
        _set(self, "model_options", _plain("model_options", self.model_options))
        _set(self, "name", self.name or self.data.config or Path(self.data.path or self.data.train).stem)
        _set(self, "out", self.out or f"runs/{self.name}")

    def _check_kind(self) -> None:
        data, kind = self.data, self.kind
        if data.path is None and "." not in data.train:
            raise ValueError("data.path is missing: name a data set on the hub, a folder or a file")
        wanted = {
            "classification": ("data.text or data.image", bool(data.text) != bool(data.image)),
            "text-to-text": ("prompt", bool(self.prompt)),
            "zero-shot": ("data.image", bool(data.image)),
        }
        what, given = wanted[kind]
        if not given:
            either = "one of the two, " if " or " in what else ""
            raise ValueError(f"kind '{kind}' needs {either}{what}")
        if len(data.text) > 2:
            raise ValueError(f"data.text: a text of one or two columns is classified, got {list(data.text)}")
        if kind == "zero-shot" and not (self.templates and all("{}" in template for template in self.templates)):
            raise ValueError(f"templates: each needs a {{}} for the class name, got {list(self.templates)}")

    @property
    def ends_at(self) -> str:
        """`linear_to`, or what is usual for the kind and head."""
        return self.linear_to or ("features" if self._trains_head else "scores")

    @property
    def _trains_head(self) -> bool:
        return self.kind == "classification" and self.head == "trained"

    def _check_end(self) -> None:
        _choice("linear_to", self.ends_at, ENDS)
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
        """Settings from plain values, as YAML gives them; an unknown key is an error that lists the known ones."""
        _check_keys(where, content, cls)
        for key in ("model", "kind", "data"):
            if content.get(key) is None:
                raise ValueError(f"{where}: '{key}' is missing")
        if not isinstance(content["data"], Mapping):
            raise ValueError(f"{where}: 'data' is a section (path, train, label, ...), got {content['data']!r}")
        _check_keys(f"{where}, data", content["data"], Data)
        try:
            return cls(**{**content, "data": Data(**content["data"])})
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
        """The fields, with both values, in which other settings differ, but for the folder.

        >>> settings = Settings("gpt2", "text-to-text", Data("tasks.jsonl"), prompt="{question}")
        >>> settings.differences(settings.changed(seed=1, out="elsewhere"))
        ['seed: 0 and 1']
        """
        mine, others = flat(self.to_dict()), flat(other.to_dict())
        return [
            f"{key}: {mine.get(key)} and {others.get(key)}"
            for key in sorted(mine.keys() | others.keys())
            if key != "out" and mine.get(key) != others.get(key)
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


def unknown(where: str, key: str, known: Iterable[str]) -> ValueError:
    """The error for a key that is not among the known ones: the nearest of them, and all."""
    known = list(known)
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return ValueError(f"{where}: unknown key '{key}'; {hint}The keys are {', '.join(known)}")


def _check_keys(where: str, content: Mapping[str, Any], kind: type) -> None:
    known = [f.name for f in fields(kind) if f.init]
    for key in content:
        if key not in known:
            raise unknown(where, str(key), known)


def _lora(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section `lora`, checked; alpha is twice the rank, as in the papers, unless it is given."""
    from peft import LoraConfig

    from linlora.layers.vanilla import refuse_changed_base

    options = _plain("lora", section)
    _check_keys("lora", options, LoraConfig)
    for key in ("task_type", "inference_mode", "base_model_name_or_path"):
        if key in options:
            raise ValueError(f"lora.{key} follows from the other settings; leave it out")
    refuse_changed_base(options.get("init_lora_weights"), "lora")
    rank = options.get("r", _RANK)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora.r, the rank, is a whole number above 0, got {rank!r}")
    options = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, **options}
    alpha, dropout = options["lora_alpha"], options["lora_dropout"]
    if not (_is_real(alpha) and alpha != 0):
        raise ValueError(f"lora.lora_alpha is a number other than 0, got {alpha!r}")
    if not (_is_real(dropout) and 0 <= dropout < 1):
        raise ValueError(f"lora.lora_dropout is a number, 0 or more and below 1, got {dropout!r}")
    return options


def _training(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section `training`, checked. Epochs that are asked for are not cut short by the default number of steps."""
    from transformers import TrainingArguments

    options = _plain("training", section)
    for key in options:
        if key in _RESERVED:
            raise ValueError(f"training.{key} is not set here; set {_RESERVED[key]}")
    _check_keys("training", options, TrainingArguments)
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    for key, value in options.items():
        if isinstance(defaults[key], (int, float)) and not isinstance(value, (int, float)):
            kind = "true or false" if isinstance(defaults[key], bool) else "a number"
            raise ValueError(f"training.{key} is {kind}, got {value!r}")
        _check_range(key, value)
    own = {k: v for k, v in _TRAINING.items() if k != "max_steps" or "num_train_epochs" not in options}
    return {**own, **options}


def _check_range(key: str, value: Any) -> None:
    """Raise a ValueError for training without a step or backwards, and for parts of a step."""
    if key in _COUNTS and not (type(value) is int and (value >= 1 or (key, value) == ("max_steps", -1))):
        more = ", or -1 with num_train_epochs" if key == "max_steps" else ""
        raise ValueError(f"training.{key} is a whole number, 1 or more{more}, got {value!r}")
    if key == "learning_rate" and not (_is_real(value) and value >= 0):
        raise ValueError(f"training.learning_rate is a number, 0 or more, got {value!r}")
    if key == "num_train_epochs" and not value > 0:
        raise ValueError(f"training.num_train_epochs is above 0, got {value!r}")


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(where: str, section: Any) -> dict[str, Any]:
    """A section as plain values, the same however it was written (tuples are lists)."""
    if not isinstance(section, Mapping):
        raise ValueError(f"'{where}' is a section of 'key: value' lines, got {section!r}")
    try:
        return json.loads(json.dumps(dict(section)))
    except TypeError as error:
        raise ValueError(f"'{where}' holds plain values (numbers, words, lists): {error}") from None


def _strings(where: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"'{where}' is a list of texts, got {value!r} (quote numbers)")
    return tuple(values)


def _check_strings(where: str, holder: Any, keys: Iterable[str], optional: bool = False) -> None:
    for key in keys:
        value = getattr(holder, key)
        if not isinstance(value, str) and not (optional and value is None):
            raise ValueError(f"{where}: '{key}' is a text, got {value!r}")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {key} '{value}'; choose one of {', '.join(choices)}")


def _set(holder: Any, key: str, value: Any) -> None:
    object.__setattr__(holder, key, value)


def _rates(rates: Any) -> tuple[float, ...]:
    rates = (rates,) if isinstance(rates, (int, float)) else rates
    if not isinstance(rates, (list, tuple)) or not all(_is_real(rate) and rate > 0 for rate in rates):
        raise ValueError(f"lr_grid is a list of learning rates above 0, got {rates!r}")
    return tuple(sorted({float(rate) for rate in rates}))
