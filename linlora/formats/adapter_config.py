"""Reads and checks `adapter_config.json` of a LoRA adapter, from any version of PEFT or another program."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from linlora.formats.patterns import Patterns
from linlora.layers.vanilla import REMEDY, not_vanilla_config, refuse_changed_base, usable_scaling
from linlora.storage.files import CorruptFileError, read_json

CONFIG_FILE = "adapter_config.json"
_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}  # LoraConfig's


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a vanilla LoRA adapter of its base model's own weights.

    Raises CorruptFileError for one that is missing, broken, or of another kind of adapter, ValueError for one whose
    start changed the base weights.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CorruptFileError(f"{folder}: no {CONFIG_FILE}, so the scaling of the adapter is unknown")
    config = read_json(path)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise CorruptFileError(f"{path}: a {reprlib.repr(kind)} adapter; linlora reads LoRA")
    if (why := not_vanilla_config(config)) is not None:
        raise CorruptFileError(f"{path}: {why}. {REMEDY}")
    refuse_changed_base(config.get("init_lora_weights"), str(path))
    for name, (meant, expected) in _MEANT.items():
        if config.get(name) is not None and not meant(config[name]):
            raise CorruptFileError(f"{path}: {name} is {reprlib.repr(config[name])}; {expected} is expected")
    return config


def scalings(deltas: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """alpha / r of every layer, alpha / sqrt(r) for rsLoRA, by the patterns of the config."""
    path = folder / CONFIG_FILE
    config = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    ranks = Patterns(config["rank_pattern"], f"{path}: rank_pattern")
    alphas = Patterns(config["alpha_pattern"], f"{path}: alpha_pattern")
    found = {}
    for name in deltas:
        layer, _, kind = name.rpartition(".")
        if kind != "dB":
            continue
        rank = int(deltas[name].shape[1])
        if (said := ranks.get(layer, config["r"])) != rank:
            raise CorruptFileError(
                f"{folder}: {CONFIG_FILE} gives layer '{layer}' the rank {said}, its tensors have rank {rank}; the two "
                "files are of different adapters"
            )
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        found[layer] = alphas.get(layer, config["lora_alpha"]) / divisor
        if not usable_scaling(found[layer]):
            raise CorruptFileError(f"{path}: layer '{layer}' has the scaling {found[layer]}, which cannot be meant")
    return found


Test = Callable[[Any], bool]


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _of_type(*types: type) -> Test:
    return lambda value: isinstance(value, types)


def _table(of: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _list(of: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(of, value))


_MEANT: dict[str, tuple[Test, str]] = {
    "r": (_rank, "a rank of 1 or more"),
    "lora_alpha": (usable_scaling, "a number of ordinary size"),
    "rank_pattern": (_table(_rank), "a table of ranks of 1 or more"),
    "alpha_pattern": (_table(usable_scaling), "a table of numbers of ordinary size"),
    "use_rslora": (_of_type(bool), "true or false"),
    "fan_in_fan_out": (_of_type(bool), "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "modules_to_save": (_list(_of_type(str)), "a list of names"),
    "trainable_token_indices": (_of_type(list, dict), "a list or a table of indices"),
    "base_model_name_or_path": (_of_type(str), "a name"),
    "task_type": (_of_type(str), "a name"),
}
