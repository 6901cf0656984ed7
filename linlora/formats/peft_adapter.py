"""PEFT LoRA adapters of any age: `adapter_config.json` beside `adapter_model.safetensors`, or the older `.bin`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from linlora.files import CorruptFileError
from linlora.formats import keys, pickles
from linlora.formats.stored import Stored
from linlora.task_vector import TaskVector, point_hash
from linlora.tensor_files import StoredTensors, TensorFile

CONFIG_FILE, TENSOR_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8  # LoraConfig's, for configs that leave them out
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def open_peft_adapter(folder: Path) -> Stored:
    """A stock LoRA adapter, as the displacement (A, B) from zero: where its training started is not in its files."""
    config = read_config(folder)
    like, read = _tensors(folder)
    factors, extras = split(like, folder)
    names = {f"{factor.layer}.d{factor.kind}": key for key, factor in factors.items()}
    deltas = {name: like[key] for name, key in names.items()}
    vector = TaskVector(
        StoredTensors(deltas, lambda name: read(names[name])), {}, point_hash({}), scalings(deltas, config, folder),
        "lora", config.get("base_model_name_or_path") or None,
    )  # fmt: skip
    notes = ["its training started from an adapter that is not in these files; the vector starts from zero"]
    if not (folder / TENSOR_FILE).is_file():
        notes.append(f"{PICKLE_FILE} is a pickle; its tensors are read, no code in it is run")
    return Stored(folder, "PEFT LoRA adapter", vector, parameters(extras, like, read), config, tuple(notes))


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA adapter. Raises CorruptFileError for one that is missing, broken or foreign."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CorruptFileError(f"{folder}: no {CONFIG_FILE}, so the scaling of the adapter is unknown")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFileError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{path}: a JSON object is expected, got a {type(config).__name__}")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise CorruptFileError(f"{path}: a {kind} adapter; linlora reads LoRA")
    if config.get("use_dora"):
        raise CorruptFileError(f"{path}: a DoRA adapter; its magnitudes are not linear in (A, B), so it has no vector")
    return config


def changes_base(init_lora_weights: Any) -> bool:
    """Whether an initialization takes the adapter's start out of the base weights.

    >>> changes_base("pissa_niter_4"), changes_base("gaussian"), changes_base(True)
    (True, False, False)
    """
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(_CHANGE_THE_BASE)


def refuse_changed_base(init_lora_weights: Any, what: str) -> None:
    """Raise a ValueError for an initialization that takes the adapter's start out of the base weights, as PiSSA does.

    The adapter is then of weights that are in no file: added to the original ones it is another function.

    >>> refuse_changed_base("gaussian", "adapter")
    >>> refuse_changed_base("pissa_niter_4", "adapter")
    Traceback (most recent call last):
    ValueError: adapter: init_lora_weights 'pissa_niter_4' changes the base weights, and the adapter is of the changed \
ones; merge it in its own model (linlora.merge), or convert it to an adapter of the original weights by PEFT's \
save_pretrained(..., path_initial_model_for_weight_conversion=START)
    """
    if changes_base(init_lora_weights):
        raise ValueError(
            f"{what}: init_lora_weights '{init_lora_weights}' changes the base weights, and the adapter is of the "
            "changed ones; merge it in its own model (linlora.merge), or convert it to an adapter of the original "
            "weights by PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=START)"
        )


def split(like: Mapping[str, Tensor], folder: Path) -> tuple[dict[str, keys.Factor], list[str]]:
    """The keys that are LoRA factors, which have to pair, and those of trained parameters of the base model."""
    factors: dict[str, keys.Factor] = {}
    others = []
    for key in like:
        found = keys.factor(key)
        if found is None and (what := keys.refused(key)):
            raise CorruptFileError(f"{folder}: '{key}' is of {what}; linlora reads LoRA of linear layers")
        if found is None:
            others.append(key)
        elif found in factors.values():
            raise CorruptFileError(
                f"{folder}: lora_{found.kind} of layer '{found.layer}' is there twice, as '{key}' too"
            )
        else:
            factors[key] = found
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


def scalings(deltas: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """alpha / r of every layer, alpha / sqrt(r) for rsLoRA, by the patterns of the config."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    found = {}
    for name in deltas:
        layer, _, kind = name.rpartition(".")
        if kind != "dB":
            continue
        rank = int(deltas[name].shape[1])
        said = ranks.get(get_pattern_key(ranks.keys(), layer), config.get("r", _DEFAULT_RANK))
        if said != rank:
            raise CorruptFileError(
                f"{folder}: {CONFIG_FILE} gives layer '{layer}' the rank {said}, its tensors have rank {rank}; the two "
                "files are of different adapters"
            )
        alpha = alphas.get(get_pattern_key(alphas.keys(), layer), config.get("lora_alpha", _DEFAULT_ALPHA))
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CorruptFileError(f"{folder}: {CONFIG_FILE} gives layer '{layer}' the alpha {alpha!r}")
        found[layer] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return found


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
