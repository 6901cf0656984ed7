"""Reads and writes `model_config/config.json` beside an adapter with a head: the class of its model, its class names.

It has a folder of its own, because transformers takes an adapter's folder with a `config.json` for a whole model:

    config = AutoConfig.from_pretrained(adapter, subfolder="model_config")
    base = AutoModelForSequenceClassification.from_pretrained(base_model, config=config)
    model = PeftModel.from_pretrained(base, adapter)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from linlora.storage.files import read_json

FOLDER = "model_config"
_OF_THE_HEAD = ("architectures", "id2label", "label2id", "problem_type")


def write_model_config(model: nn.Module, folder: Path) -> None:
    """Write the configuration of a transformers model; any other model has none."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
        config.save_pretrained(str(folder / FOLDER))


def copy_model_config(source: Path, folder: Path) -> None:
    """Copy the configuration of an adapter's folder into another."""
    if (source / FOLDER / "config.json").is_file():
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / FOLDER / "config.json", folder / FOLDER / "config.json")


def read_head_config(folder: Path) -> dict[str, Any] | None:
    """The entries that a head adds to the configuration of a base model; None where the folder does not say."""
    path = folder / FOLDER / "config.json"
    if not path.is_file():
        return None
    content = read_json(path)
    return {key: content[key] for key in _OF_THE_HEAD if content.get(key)}
