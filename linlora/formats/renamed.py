"""A base model without its weights: names that transformers spells otherwise in files, and weights it shares."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from linlora.layers.sharing import shared_names
from linlora.storage.files import CorruptFileError, read_json

_MOST = 10_000
"""Layers, experts and the like; to build more modules takes longer than anyone waits."""
_COUNTS = re.compile("layer|expert|block|stage|depth")


def skeleton(folder: Path) -> nn.Module | None:
    """The model of a folder's `config.json` on the meta device; None where transformers knows no such model.

    >>> import linlora
    >>> linlora.testing.tiny_base("vit").save_pretrained("base")
    >>> type(skeleton(Path("base"))).__name__
    'ViTForImageClassification'
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    if (absurd := _too_many(config)) is not None:
        raise CorruptFileError(f"{folder / 'config.json'}: {absurd} is beyond {_MOST:,}, which cannot be meant")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        architecture = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
            architecture = transformers.AutoModel.from_config
        with torch.device("meta"):
            model = architecture(config)
            model.tie_weights()
    except Exception:  # a configuration that its model does not take
        return None
    return model


def names_in_files(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The name in a checkpoint of each parameter of a model, as this version of transformers would save it.

    A parameter that is saved in another form than a tensor of its own (several in one) is left out.

    >>> import linlora
    >>> model = linlora.testing.tiny_base("vit")
    >>> names = [name for name, _ in model.named_parameters()]
    >>> len(names_in_files(model, names)) == len(names)
    True
    """
    found = {}
    for name in names:
        name_in_file = _name_in_file(model, name)
        if name_in_file is not None:
            found[name] = name_in_file
    return found


def tied_in_files(model: nn.Module) -> list[list[str]]:
    """The parameters that a model shares between modules, in groups, by their names in a checkpoint.

    >>> import linlora
    >>> tied_in_files(linlora.testing.tiny_base("llama", tie_word_embeddings=True))
    [['lm_head.weight', 'model.embed_tokens.weight']]
    """
    groups = shared_names(model)
    return [sorted(names_in_files(model, group).get(name, name) for name in group) for group in groups]


def _too_many(config: Any, name: str = "") -> str | None:
    """The name of a number of layers or the like in a configuration that is beyond all models."""
    if isinstance(config, dict):
        return next((found for key, value in config.items() if (found := _too_many(value, key)) is not None), None)
    if isinstance(config, list):
        return next((found for value in config if (found := _too_many(value, name)) is not None), None)
    return name if isinstance(config, (int, float)) and config > _MOST and _COUNTS.search(name) else None


def _name_in_file(model: nn.Module, name: str) -> str | None:
    tensor = torch.empty(1, 1, device="meta")
    try:
        converted = revert_weight_conversion(model, {name: tensor})
    except Exception:  # a conversion that needs the other tensors
        return None
    (key, value), *others = converted.items()
    return key if not others and value.shape == tensor.shape else None
