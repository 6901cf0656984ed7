"""Finds the weights of a base model in the files of its folder, without building the model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from linlora.formats.base_folder import inside, shard
from linlora.formats.renamed import names_in_files, skeleton, tied_in_files
from linlora.storage.files import CorruptFileError, read_json
from linlora.storage.tensor_files import Entry, TensorFile

SINGLE_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Model types whose linear layers are transformers' Conv1D, which stores its weight (K, N)."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_EMBEDDING = re.compile(r"(embed\w*|wte|shared)\.weight$")


class WrongBaseError(ValueError):
    """An adapter has layers that the base model lacks, or has in another size; the message names them."""


class Placed(NamedTuple):
    """The key of an adapted layer's weight, and whether it is stored (K, N)."""

    key: str
    transposed: bool


class Checkpoint:
    """A folder of safetensors weights, opened.

    Raises FileNotFoundError for a folder without a model, CorruptFileError for a damaged one, ValueError for weights
    that are quantized or pickled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; a model of the Hugging Face hub has to be downloaded first: "
                "hf download OWNER/NAME --local-dir FOLDER"
            )
        has_config = (folder / CONFIG_FILE).is_file()
        self.config = read_json(inside(folder, folder / CONFIG_FILE)) if has_config else {}
        if quantization := self.config.get("quantization_config"):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise ValueError(
                f"{folder}: the weights are quantized ({method}), and ΔW would be lost in their rounding. Serve base "
                "and adapter unmerged, or merge into the original weights and quantize the result"
            )
        self.index = self._read_index()
        self.files = {name: TensorFile(folder / name) for name in self._shards()}
        self.home: dict[str, TensorFile] = {}
        for file in self.files.values():
            for key in file.entries:
                if self.home.setdefault(key, file) is not file:
                    raise CorruptFileError(f"{folder}: '{key}' is in {self.home[key].path.name} and {file.path.name}")
        if lost := [key for key in (self.index or {"weight_map": {}})["weight_map"] if key not in self.home]:
            raise CorruptFileError(f"{folder / INDEX_FILE}: '{lost[0]}' is in none of its shards")

    @cached_property
    def skeleton(self) -> nn.Module | None:
        """The model without its weights, where transformers knows it."""
        return skeleton(self.folder) if self.config else None

    @cached_property
    def tied(self) -> list[list[str]]:
        """Groups of keys whose weights the model shares; loading ties the keys that are in no file.

        In a model that transformers does not know, the embedding and the output embedding count as tied, unless its
        configuration says that they are not, or both are in the files.
        """
        if self.skeleton is not None:
            return tied_in_files(self.skeleton)
        if self.config.get("tie_word_embeddings") is False or any(key.endswith("lm_head.weight") for key in self.home):
            return []
        return [[key, "the output embedding"] for key in self.home if _EMBEDDING.search(key)]

    def entry(self, key: str) -> Entry:
        return self.home[key].entries[key]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the largest weight."""
        key = max(self.home, key=lambda key: math.prod(self.entry(key).shape))
        return self.home[key].like(key).dtype

    def place(self, layers: Mapping[str, tuple[int, int]]) -> dict[str, Placed]:
        """Find the weights of layers of shape (N, K). Raises WrongBaseError where the base has no such layer."""
        keys = self.keys([f"{name}.weight" for name in layers])
        missing = [name for name in layers if keys[f"{name}.weight"] not in self.home]
        if missing:
            tied = any(name.endswith("lm_head") for name in missing)
            raise WrongBaseError(
                f"{self.folder} has no weight for {len(missing)} of {len(layers)} adapted layers, the first of them "
                f"'{missing[0]}'; it holds {', '.join(list(self.home)[:3])}, ... Is it the model the adapter was "
                "trained on?" + " It shares the weight of the embedding, which cannot be changed alone." * tied
            )
        shapes = {name: self.entry(keys[f"{name}.weight"]).shape for name in layers}
        for name, shape in layers.items():
            if shapes[name] not in (tuple(shape), tuple(shape[::-1])):
                raise WrongBaseError(
                    f"layer '{name}' of the adapter is {shape[1]} -> {shape[0]}, its weight in {self.folder} is "
                    f"{shapes[name]}: not the model the adapter was trained on"
                )
        told = {shapes[name] != tuple(shape) for name, shape in layers.items() if shape[0] != shape[1]}
        transposed = told.pop() if told else self.config.get("model_type") in CONV1D_MODELS
        if told:
            raise WrongBaseError(f"{self.folder}: some of the adapted layers are stored (N, K) and some (K, N)")
        return {name: Placed(keys[f"{name}.weight"], transposed) for name in layers}

    def keys(self, names: list[str]) -> dict[str, str]:
        """The key of each parameter of the model; where the checkpoint has none, a key that is not in it.

        A name is the key; or transformers converts it to the key; or a prefix, the same for all, is added or removed,
        where adapter or checkpoint is of a part of the model.
        """
        found = {name: name for name in names}
        if any(name not in self.home for name in names):
            found.update(names_in_files(self.skeleton, names) if self.skeleton is not None else {})
        if not any(key in self.home for key in found.values()):
            shift = self._shift(found[names[0]])
            found = {name: shift(key) for name, key in found.items()}
        return found

    def _shift(self, key: str) -> Callable[[str], str]:
        """A function that adds, or removes, the prefix by which one key differs from the checkpoint's."""
        longer = [known for known in self.home if known.endswith(f".{key}")]
        parts = key.split(".")
        prefixes = [".".join(parts[:cut]) + "." for cut in range(1, len(parts) - 1)]
        shorter = [prefix for prefix in prefixes if key.removeprefix(prefix) in self.home]
        if len(longer) == 1:
            return lambda name: longer[0].removesuffix(key) + name
        return lambda name: name.removeprefix(shorter[0]) if shorter else name

    def _read_index(self) -> dict[str, Any] | None:
        """The index; None also where transformers, saving a single file, removed the shards and left it behind."""
        if not (self.folder / INDEX_FILE).is_file():
            return None
        index = read_json(inside(self.folder, self.folder / INDEX_FILE))
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFileError(f"{self.folder / INDEX_FILE}: the list of shards (weight_map) is missing")
        shards = set(map(str, weight_map.values()))
        gone = all(_SHARD.fullmatch(name) and not (self.folder / name).is_file() for name in shards)
        return None if gone and (self.folder / SINGLE_FILE).is_file() else index

    def _shards(self) -> list[str]:
        if self.index is not None:
            names = [shard(self.folder, name).name for name in sorted(set(map(str, self.index["weight_map"].values())))]
            if (self.folder / SINGLE_FILE).is_file() and SINGLE_FILE not in names:
                raise CorruptFileError(
                    f"{self.folder}: {SINGLE_FILE} and the shards of {INDEX_FILE} are two models, one saved over the "
                    "other; transformers loads the first. Remove the files that are not meant"
                )
            return names
        if (self.folder / SINGLE_FILE).is_file():
            return [inside(self.folder, self.folder / SINGLE_FILE).name]
        if list(self.folder.glob("pytorch_model*.bin")):
            raise ValueError(
                f"{self.folder}: the weights are pickles; load the model and save_pretrained it: that is safetensors"
            )
        raise FileNotFoundError(f"{self.folder}: no model in this folder (neither {SINGLE_FILE} nor {INDEX_FILE})")
