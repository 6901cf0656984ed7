"""PEFT LoRA adapters of any age: `adapter_config.json` beside `adapter_model.safetensors`, or the older `.bin`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from linlora.formats import keys, pickles
from linlora.formats.adapter_config import read_config, scalings
from linlora.formats.stored import Stored
from linlora.layers.vanilla import not_a_factor
from linlora.storage.files import CorruptFileError
from linlora.storage.tensor_files import TensorFile
from linlora.storage.tensors import StoredTensors
from linlora.vectors.points import point_hash
from linlora.vectors.weight_vector import WeightVector

TENSOR_FILE, PICKLE_FILE = "adapter_model.safetensors", "adapter_model.bin"


def open_peft_adapter(folder: Path) -> Stored:
    """A stock LoRA adapter, as what it adds to the weights: where its training started is not in its files."""
    config = read_config(folder)
    like, read = _tensors(folder)
    factors, extras = split(like, folder)
    names = {f"{factor.layer}.d{factor.kind}": key for key, factor in factors.items()}
    deltas = {name: like[key] for name, key in names.items()}
    vector = WeightVector(
        StoredTensors(deltas, lambda name: read(names[name])), {}, point_hash({}), scalings(deltas, config, folder),
        "weight", config.get("base_model_name_or_path") or None,
    )  # fmt: skip
    notes = ["its training started from an adapter that is not in these files; the vector is what it adds to W"]
    if not (folder / TENSOR_FILE).is_file():
        notes.append(f"{PICKLE_FILE} is a pickle; its tensors are read, no code in it is run")
    return Stored(folder, "PEFT LoRA adapter", vector, parameters(extras, like, read), config, tuple(notes))


def split(like: Mapping[str, Tensor], folder: Path) -> tuple[dict[str, keys.Factor], list[str]]:
    """The keys that are LoRA factors, which have to pair, and those of trained parameters of the base model."""
    factors: dict[str, keys.Factor] = {}
    seen: set[keys.Factor] = set()
    others = []
    for key in like:
        found = keys.factor(key)
        if found is None and (what := not_a_factor(key)):
            raise CorruptFileError(f"{folder}: '{key}' is of {what}; linlora reads LoRA of linear layers")
        if found is None:
            others.append(key)
        elif found in seen:
            raise CorruptFileError(
                f"{folder}: lora_{found.kind} of layer '{found.layer}' is there twice, as '{key}' too"
            )
        elif not like[key].is_floating_point():
            raise CorruptFileError(f"{folder}: '{key}' is {like[key].dtype}; factors are of floating point")
        else:
            factors[key] = found
            seen.add(found)
    shapes = {found: like[key].shape for key, found in factors.items()}
    for layer in dict.fromkeys(found.layer for found in factors.values()):
        A, B = (shapes.get(keys.Factor(layer, kind)) for kind in "AB")
        if A is None or B is None:
            raise CorruptFileError(f"{folder}: layer '{layer}' has no lora_{'B' if B is None else 'A'}")
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            raise CorruptFileError(
                f"{folder}: layer '{layer}': lora_A is {tuple(A)} and lora_B {tuple(B)}; (r, K) and (N, r) are expected"
            )
    if not factors:
        raise CorruptFileError(f"{folder}: no LoRA factor in it; it holds {', '.join(others[:3]) or 'nothing'}")
    return factors, [key for key in others if not keys.unused(key)]


def parameters(names: Iterable[str], like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> StoredTensors:
    """Trained parameters of the base model, by their names there."""
    there = {keys.in_base_model(key): key for key in names}
    return StoredTensors({name: like[key] for name, key in there.items()}, lambda name: read(there[name]))


def _tensors(folder: Path) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    if (folder / TENSOR_FILE).is_file():
        file = TensorFile(folder / TENSOR_FILE)
        return {name: file.like(name) for name in file.entries}, file.read
    tensors = pickles.load(folder / PICKLE_FILE)
    return {n: torch.empty_like(t, device="meta") for n, t in tensors.items()}, tensors.__getitem__
