"""The sections `lora`, `training` and `model_options` of the settings: fields of PEFT's and transformers' classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from linlora.training.setting import SECTION, Values, check_keys, number, whole

# TrainingArguments that `Settings` or `train` decide, with what to set instead.
_RESERVED = {
    "output_dir": "out",
    "seed": "seed",
    "resume_from_checkpoint": "nothing: a run continues in its folder by itself",
    "save_only_model": "nothing: a run continues from its checkpoints, which takes the optimizer's state",
    "remove_unused_columns": "nothing: the columns that are used are named under data",
    "label_names": "data.label",
    "bf16_full_eval": "bf16: rows are scored in the arithmetic of training", "fp16_full_eval": "fp16: the same",
    "do_train": "nothing", "do_eval": "nothing", "do_predict": "nothing",
    "push_to_hub": "nothing: upload the folder of the run when it is done",
}  # fmt: skip
# Values that PEFT and transformers do not check before the model is made, or at all.
_LORA = {
    "r": whole(1),
    "lora_alpha": number(" other than 0", bool),
    "lora_dropout": number(", 0 or more and below 1", lambda v: 0 <= v < 1),
}
_TRAINING = {
    "learning_rate": number(", 0 or more", lambda v: v >= 0),
    "max_steps": Values(
        "a whole number, 1 or more, or -1 with num_train_epochs", lambda v: type(v) is int and (v > 0 or v == -1), int
    ),
    "num_train_epochs": number(" above 0", lambda v: v > 0),
    "per_device_train_batch_size": whole(1),
    "per_device_eval_batch_size": whole(1),
    "gradient_accumulation_steps": whole(1),
}
_DEFAULT_TRAINING = {"per_device_train_batch_size": 16, "max_steps": 1000}


def _plain(section: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A section as plain values, the same however it was written (tuples are lists)."""
    try:
        return json.loads(json.dumps(dict(content)))
    except TypeError as error:
        raise ValueError(f"{section} holds plain values (numbers, words, lists): {error}") from None


def _checked(section: str, options: dict[str, Any], values: Mapping[str, Values]) -> dict[str, Any]:
    return {
        key: values[key].checked(f"{section}.{key}", value) if key in values else value
        for key, value in options.items()
    }


def _lora(content: Mapping[str, Any]) -> dict[str, Any]:
    """The section `lora`, checked; alpha is twice the rank, as in the papers, unless it is given."""
    from peft import LoraConfig

    from linlora.layers.vanilla import refuse_changed_base

    options = _checked("lora", {"r": 16, **_plain("lora", content)}, _LORA)
    check_keys("lora", options, LoraConfig)
    for key in ("task_type", "inference_mode", "base_model_name_or_path"):
        if key in options:
            raise ValueError(f"lora.{key} follows from the other settings; leave it out")
    refuse_changed_base(options.get("init_lora_weights"), "lora")
    if options.get("target_modules") == ["all-linear"]:  # as a flag has it
        options["target_modules"] = "all-linear"
    return {"lora_alpha": 2 * options["r"], "lora_dropout": 0.0, **options}


def _training(content: Mapping[str, Any]) -> dict[str, Any]:
    """The section `training`, checked. Epochs that are asked for are not cut short by the default number of steps."""
    from transformers import TrainingArguments

    options = _checked("training", _plain("training", content), _TRAINING)
    for key in options:
        if key in _RESERVED:
            raise ValueError(f"training.{key} is not set here; set {_RESERVED[key]}")
    check_keys("training", options, TrainingArguments)
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    for key, value in options.items():
        if isinstance(defaults[key], (int, float)) and not isinstance(value, (int, float)):
            kind = "true or false" if isinstance(defaults[key], bool) else "a number"
            raise ValueError(f"training.{key} is {kind}, got {value!r}")
    own = {k: v for k, v in _DEFAULT_TRAINING.items() if k != "max_steps" or "num_train_epochs" not in options}
    return {**own, **options}


LORA = replace(SECTION, read=_lora)
TRAINING = replace(SECTION, read=_training)
OPTIONS = replace(SECTION, read=partial(_plain, "model_options"))
