"""Parameter names that transformers spells otherwise in files than in modules: ViT's, for one, since version 5."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion


def names_in_files(folder: Path, names: list[str]) -> dict[str, str]:
    """The name in a checkpoint of each parameter of a model, as this version of transformers would save it.

    The model of the folder's `config.json` is built without memory, on the meta device. A parameter that is saved in
    another form than a tensor of its own (several in one) is left out, and so are all where transformers does not know
    the model.

    >>> import linlora
    >>> linlora.testing.tiny_base("vit").config.save_pretrained("base")
    >>> names = [name for name, _ in linlora.testing.tiny_base("vit").named_parameters()]
    >>> len(names_in_files(Path("base"), names)) == len(names)
    True
    """
    if json.loads((folder / "config.json").read_text()).get("model_type") not in transformers.CONFIG_MAPPING:
        return {}
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config) if architecture is None else architecture(config)
    found = {}
    for name in names:
        name_in_file = _name_in_file(model, name)
        if name_in_file is not None:
            found[name] = name_in_file
    return found


def _name_in_file(model: nn.Module, name: str) -> str | None:
    tensor = torch.empty(1, 1, device="meta")
    try:
        converted = revert_weight_conversion(model, {name: tensor})
    except Exception:  # a conversion that needs the other tensors
        return None
    (key, value), *others = converted.items()
    return key if not others and value.shape == tensor.shape else None
