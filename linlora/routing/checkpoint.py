"""Reads and writes a routed model as one safetensors file, which is whole or absent.

Its metadata describe layers, selectors and modules_to_save, so `RoutedModel.from_pretrained` needs no more than the
base model; its tensors are the model's state dict.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from linlora.routing.routed_layer import LayerSizes
from linlora.routing.scope import scope_of, set_scope
from linlora.routing.selectors import Selector
from linlora.routing.structure import Inventory, RoutedStructure
from linlora.routing.variants import make_selector
from linlora.storage.files import CorruptFileError, parse_json
from linlora.storage.tensor_files import load_tensors, save_tensors
from linlora.vectors.base_models import model_name

FILE = "routed_model.safetensors"
FORMAT = "linlora.routed_model"
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class Saved:
    """The content of a file; `states` are those of the layers, in their order."""

    inventories: dict[str, Inventory]
    states: list[str]
    selectors: dict[str, Selector]
    modules_to_save: list[str]
    base_model: str
    scope: str | None
    trainable: set[str]
    tensors: dict[str, Tensor]


def write(model: RoutedStructure, directory: str | os.PathLike) -> None:
    """Write the file of a routed model into a directory."""
    description = {
        "layers": [
            (name, inventory.sizes.description(), inventory.selector, getattr(layer, "state", "plain"))
            for (name, inventory), layer in zip(model.inventories.items(), model.layers, strict=True)
        ],
        "selectors": {name: selector.description() for name, selector in model.selector_by_name.items()},
        "modules_to_save": list(model.modules_to_save),
        "scope": scope_of(model),
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "base_model": _name(model.model),
    }
    metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "description": json.dumps(description)}
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    save_tensors(Path(directory) / FILE, tensors, metadata)


def read(directory: str | os.PathLike, variants: Sequence[type[Selector]] = ()) -> Saved:
    """Read the file of a routed model; refuses a broken or foreign one by name."""
    path = Path(directory) / FILE
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise CorruptFileError(f"{path}: not a routed model (no '{FORMAT}' in its metadata)")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CorruptFileError(
            f"{path}: format version {metadata.get('format_version')}, this linlora reads {FORMAT_VERSION}; update "
            "linlora"
        )
    saved = parse_json(metadata.get("description", ""), f"{path}: its description")
    try:
        return Saved(
            {name: Inventory(LayerSizes(**sizes), selector) for name, sizes, selector, _ in saved["layers"]},
            [state for _, _, _, state in saved["layers"]],
            {name: make_selector(described, variants) for name, described in saved["selectors"].items()},
            saved["modules_to_save"], saved["base_model"], saved["scope"], set(saved["trainable"]), tensors,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path}: its description is not of a routed model ({error}); it was altered") from error


def check_base(model: nn.Module, saved: Saved, directory: str | os.PathLike) -> None:
    """Raise a ValueError unless the base model has the layers of the file; warn where it has another name."""
    names = {name for name, _ in model.named_modules()}
    missing = [name for name in (*saved.inventories, *saved.modules_to_save) if name not in names]
    if missing:
        raise ValueError(
            f"{Path(directory) / FILE}: {type(model).__name__} has no module '{missing[0]}' ({len(missing)} of its "
            "modules are missing); pass the base model it was saved from, before any adapter is put on it"
        )
    name = _name(model)
    if saved.base_model and name and model_name(saved.base_model) != model_name(name):
        warnings.warn(
            f"{Path(directory) / FILE}: was saved from a model on '{saved.base_model}', and is put on '{name}'; on "
            "other weights the skills compute something else",
            stacklevel=3,
        )


def _name(base: nn.Module) -> str:
    """The folder or the id that a base model was loaded from, where transformers knows it."""
    return getattr(getattr(base, "config", None), "_name_or_path", None) or ""


def restore(model: RoutedStructure, saved: Saved, directory: str | os.PathLike) -> None:
    """Bring a model made from the description of a file to the state of the file."""
    for layer, state in zip(model.layers, saved.states, strict=True):
        if state != "plain":
            cast(Any, layer).allocate_point(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in saved.trainable)
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | saved.tensors.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (saved.tensors, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{Path(directory) / FILE}: '{name}' is {shapes[0]} in the file, {shapes[1]} in the model; was the "
                "model saved from another base?"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved.tensors[name])
    if saved.scope is not None:
        set_scope(model, saved.scope)
