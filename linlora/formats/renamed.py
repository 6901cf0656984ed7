"""Builds a base model without its weights, for the names its parameters have in files and the weights it shares."""

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
"""The largest number of layers or experts that is built; more take longer than anyone waits."""
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

    Parameters that are saved several in one tensor are left out.

    >>> import linlora
    >>> model = linlora.testing.tiny_base("vit")
    >>> names = [name for name, _ in model.named_parameters()]
    >>> len(names_in_files(model, names)) == len(names)
    True
    """
    found = {name: _name_in_file(model, name) for name in names}
    return {name: in_file for name, in_file in found.items() if in_file is not None}


def tied_in_files(model: nn.Module) -> list[list[str]]:
    """Groups of names, as in a checkpoint, of the parameters that a model shares between modules.

    >>> import linlora
    >>> tied_in_files(linlora.testing.tiny_base("llama", tie_word_embeddings=True))
    [['lm_head.weight', 'model.embed_tokens.weight']]
    """
    return [sorted(names_in_files(model, group).get(name, name) for name in group) for group in shared_names(model)]


def _too_many(config: Any, name: str = "") -> str | None:
    """The name of a number of layers or the like, somewhere in a configuration, that is beyond all models."""
    if isinstance(config, (dict, list)):
        parts = config.items() if isinstance(config, dict) else ((name, value) for value in config)
        return next((found for key, value in parts if (found := _too_many(value, key)) is not None), None)
    return name if isinstance(config, (int, float)) and config > _MOST and _COUNTS.search(name) else None


def _name_in_file(model: nn.Module, name: str) -> str | None:
    tensor = torch.empty(1, 1, device="meta")
    try:
        converted = revert_weight_conversion(model, {name: tensor})
    except Exception:  # a conversion that needs the other tensors
        return None
    (key, value), *others = converted.items()
    return key if not others and value.shape == tensor.shape else None
