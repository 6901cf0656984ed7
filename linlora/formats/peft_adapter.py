"""PEFT LoRA adapters of any age: `adapter_config.json` beside `adapter_model.safetensors`, or the older `.bin`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from linlora.formats import keys, pickles
from linlora.formats.adapter_config import read_config, scalings
from linlora.formats.stored import Stored
from linlora.layers.vanilla import not_a_factor
from linlora.storage.files import CorruptFileError
from linlora.storage.tensor_files import TensorFile
from linlora.storage.tensors import StoredTensors, renamed, shapes
from linlora.vectors.points import point_hash
from linlora.vectors.weight_vector import WeightVector

TENSOR_FILE, PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"


def open_peft_adapter(folder: Path) -> Stored:
    """A stock LoRA adapter, as what it adds to the weights: where its training started is not in its files."""
    config = read_config(folder)
    notes = ["its training started from an adapter that is not in these files; the vector is what it adds to W"]
    tensors: Mapping[str, Tensor]
    if (folder / TENSOR_FILE).is_file():
        tensors = TensorFile(folder / TENSOR_FILE).tensors()
    else:
        tensors = pickles.load(folder / PICKLE_FILE)
        notes.append(f"{PICKLE_FILE} is a pickle; its tensors are read, no code in it is run")
    deltas, extras = split(tensors, folder)
    scaling, base_model = scalings(deltas.like, config, folder), config.get("base_model_name_or_path") or None
    vector = WeightVector(deltas, {}, point_hash({}), scaling, "weight", base_model)
    return Stored(folder, "PEFT LoRA adapter", vector, extras, config, tuple(notes))


def split(tensors: Mapping[str, Tensor], folder: Path) -> tuple[StoredTensors, StoredTensors]:
    """The factors in an adapter's file, '<layer>.dA' and '<layer>.dB', and the trained parameters of the base model.

    Raises CorruptFileError for factors that do not pair, and for a part of another kind of adapter.
    """
    like = shapes(tensors)
    factors: dict[str, str] = {}
    extras: dict[str, str] = {}
    for key in like:
        if keys.unused(key):
            continue
        factor = keys.factor(key)
        if factor is None:
            if what := not_a_factor(key):
                raise CorruptFileError(f"{folder}: '{key}' is of {what}; linlora reads LoRA of linear layers")
            other = extras.setdefault(keys.in_base_model(key), key)  # PEFT writes some parameters by two names
            if other != key and not torch.equal(tensors[other], tensors[key]):
                raise CorruptFileError(f"{folder}: '{other}' and '{key}' are one parameter with two values")
            continue
        if factors.setdefault(f"{factor.layer}.d{factor.kind}", key) != key:
            raise CorruptFileError(
                f"{folder}: lora_{factor.kind} of layer '{factor.layer}' is there twice, as '{key}' too"
            )
        if not like[key].is_floating_point():
            raise CorruptFileError(f"{folder}: '{key}' is {like[key].dtype}; factors are of floating point")
    sizes = {name: like[key].shape for name, key in factors.items()}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in factors):
        A, B = (sizes.get(f"{layer}.d{kind}") for kind in "AB")
        if A is None or B is None:
            raise CorruptFileError(f"{folder}: layer '{layer}' has no lora_{'B' if B is None else 'A'}")
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise CorruptFileError(
                f"{folder}: layer '{layer}': lora_A is {tuple(A)} and lora_B {tuple(B)}; (r, K) and (N, r) are expected"
            )
    if not factors:
        raise CorruptFileError(f"{folder}: no LoRA factor in it; it holds {', '.join(list(like)[:3]) or 'nothing'}")
    return renamed(tensors, factors), renamed(tensors, extras)
