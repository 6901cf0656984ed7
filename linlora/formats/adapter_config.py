"""`adapter_config.json` of a LoRA adapter, from any version of PEFT or another program: checked before it is used."""

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
_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8  # LoraConfig's, for configs that leave them out


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a vanilla LoRA adapter of its base model's own weights.

    Raises CorruptFileError for one that is missing, broken or foreign, ValueError for one of another kind of adapter.
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
    ranks = Patterns(config.get("rank_pattern") or {}, f"{path}: rank_pattern")
    alphas = Patterns(config.get("alpha_pattern") or {}, f"{path}: alpha_pattern")
    r, lora_alpha = _or(config.get("r"), _DEFAULT_RANK), _or(config.get("lora_alpha"), _DEFAULT_ALPHA)
    found = {}
    for name in deltas:
        layer, _, kind = name.rpartition(".")
        if kind != "dB":
            continue
        rank = int(deltas[name].shape[1])
        if (said := ranks.get(layer, r)) != rank:
            raise CorruptFileError(
                f"{folder}: {CONFIG_FILE} gives layer '{layer}' the rank {said}, its tensors have rank {rank}; the two "
                "files are of different adapters"
            )
        found[layer] = alphas.get(layer, lora_alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not usable_scaling(found[layer]):
            raise CorruptFileError(f"{path}: layer '{layer}' has the scaling {found[layer]}, which cannot be meant")
    return found


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _table(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _bool(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _indices(value: Any) -> bool:
    return isinstance(value, (list, dict))


_MEANT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_rank, "a rank of 1 or more"),
    "lora_alpha": (usable_scaling, "a number of ordinary size"),
    "rank_pattern": (_table(_rank), "a table of ranks of 1 or more"),
    "alpha_pattern": (_table(usable_scaling), "a table of numbers of ordinary size"),
    "use_rslora": (_bool, "true or false"),
    "fan_in_fan_out": (_bool, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "modules_to_save": (_names, "a list of names"),
    "trainable_token_indices": (_indices, "a list or a table of indices"),
    "base_model_name_or_path": (_text, "a name"),
    "task_type": (_text, "a name"),
}
