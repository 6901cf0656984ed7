"""`export`: an adapter in files that stock PEFT, vLLM and SGLang load."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from linlora import formats
from linlora.formats import Stored
from linlora.formats.adapter_config import CONFIG_FILE
from linlora.formats.adapter_folder import adapter_folder
from linlora.formats.checkpoint import Checkpoint
from linlora.formats.model_config import copy_model_config, write_model_config
from linlora.formats.peft_adapter import TENSOR_FILE
from linlora.formats.vector_folder import save_beside
from linlora.layers.folding import folded_configs, folded_state_dict, with_sizes
from linlora.layers.lora_linear import converted_layers
from linlora.layers.sharding import writes
from linlora.layers.vanilla import changed_base, refuse_changed_base
from linlora.storage.tensor_files import save_tensors
from linlora.storage.tensors import StoredTensors, finite, joined, renamed, shapes
from linlora.vectors.adapters import one_adapter
from linlora.vectors.factors import factors_of
from linlora.vectors.points import DifferentPointError
from linlora.vectors.task_vector import TaskVector

_KEPT = ("task_type", "fan_in_fan_out", "modules_to_save", "bias", "trainable_token_indices")
"""Configuration keys that are copied unchanged."""


def export(
    source: PeftModel | TaskVector,
    directory: str | os.PathLike,
    adapter: str | None = None,
    base: str | os.PathLike | None = None,
) -> None:
    """Write an adapter of a model (the active one if not named), or a task vector, for stock PEFT, vLLM or SGLang.

    `adapter_model.safetensors` and `adapter_config.json` hold the exact LoRA factors of the layer-scope function, of
    rank r where B0 = 0 and 2r elsewhere; `task_vector.safetensors` holds (dA, dB) and the linearization point, for
    `TaskVector.load`; `model_config/config.json` the class names of a head. A plain LoRA adapter of a model has no
    linearization point, so no vector is written for it: save `TaskVector.from_model(model, point=start)` beside it.
    Each file is replaced in one step; files of an adapter that was in the directory and would be read in place of the
    new ones are removed.

    With a model sharded by FSDP2 every process has to call this, and rank 0 writes; under DDP let rank 0 call it.

    Args:
        base: for a task vector, what the adapter is of: the hub id or folder of the base model, or the folder of an
            adapter of it, whose configuration (task type, head) is taken over. A folder is checked against the vector.

    Raises ValueError for scope "model", which no LoRA adapter computes, for a vector without its point, and for NaN;
    WrongBaseError for a base that the vector does not fit.

    >>> import linlora, peft
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> linlora.export(model, "adapter")
    >>> linlora.export(2.0 * linlora.TaskVector.from_model(model), "doubled")
    >>> base = linlora.testing.tiny_base("bert")
    >>> print(type(peft.PeftModel.from_pretrained(base, "doubled")).__name__)
    PeftModel
    """
    if isinstance(source, TaskVector):
        return export_stored(Stored(Path(directory), "task vector", source), directory, base)
    if not isinstance(source, PeftModel):
        raise TypeError(
            f"export takes a PeftModel or a TaskVector, got {type(source).__name__}; a task of a routed model is "
            "exported by linlora.routing.export_task"
        )
    adapter = one_adapter(source, adapter)
    linearized = any(layer.states.get(adapter, "plain") != "plain" for _, layer in converted_layers(source))
    vector = TaskVector.from_model(source, adapter) if linearized else None
    if vector is not None and vector.scope == "model":
        raise ValueError(
            "export: no LoRA adapter has the function of a model linearized at model scope. Save its task vector, "
            "TaskVector.from_model(model).save(path), or export the layer-scope function: "
            "linlora.set_scope(model, 'layer')"
        )
    if any(converted_layers(source)):  # PEFT's own adapter says how it was initialized, and is loaded so
        refuse_changed_base(changed_base(source.peft_config.values()), f"export: adapter '{adapter}'")
    state_dict = folded_state_dict(source)
    if not writes(source):
        return
    with adapter_folder(directory) as staging:
        with folded_configs(source):
            type(source).save_pretrained(source, str(staging), selected_adapters=[adapter], state_dict=state_dict)
        home = next(staging.rglob(TENSOR_FILE)).parent  # PEFT gives an adapter of another name than "default" a folder
        if broken := [name for name, tensor in load_file(home / TENSOR_FILE).items() if not finite(tensor)]:
            raise ValueError(f"export: adapter '{adapter}' holds NaN or infinity in '{broken[0]}'; nothing was written")
        if getattr(source.peft_config[adapter], "modules_to_save", None):
            write_model_config(source.get_base_model(), staging)
        if vector is not None:
            save_beside(vector, home)


def export_stored(stored: Stored, directory: str | os.PathLike, base: str | os.PathLike | None = None) -> None:
    """`export` of what lies in a file or folder: the vector, and what was trained beside it."""
    vector = stored.vector
    config, extras, base_model = dict(stored.config), stored.extras, vector.base_model
    described = stored.path
    if base is not None and (Path(base) / CONFIG_FILE).is_file():
        adapter = formats.open(base)
        _check_adapter_of_base(stored, adapter)
        config, extras, base_model = dict(adapter.config), adapter.extras, adapter.vector.base_model
        described = adapter.path
    elif base is not None:
        base_model = str(base)
        if Path(base).is_dir():
            placed = Checkpoint(Path(base)).place(stored.layer_sizes())
            config["fan_in_fan_out"] = any(place.transposed for place in placed.values())
    factors, sizes = _stored_factors(vector)
    names = {}
    for name in extras:
        layer, _, parameter = name.rpartition(".")
        there = f"{layer}.base_layer.{parameter}" if layer in sizes else name  # the bias of an adapted layer
        names[f"base_model.model.{there}"] = name
    kept = {key: config[key] for key in _KEPT if config.get(key)}
    lora = LoraConfig(target_modules=list(sizes), inference_mode=True, base_model_name_or_path=base_model, **kept)
    with adapter_folder(directory) as staging:
        with_sizes(lora, sizes).save_pretrained(str(staging))
        tensors = joined(factors, renamed(extras, names))
        save_tensors(staging / TENSOR_FILE, tensors, {"format": "pt", **vector.own_metadata()})
        if vector.point:
            save_beside(vector, staging)
        copy_model_config(described, staging)


def _check_adapter_of_base(stored: Stored, like: Stored) -> None:
    """Raise a DifferentPointError unless an adapter is of a vector's layers; in weight space, of some."""
    mine, its = stored.layer_sizes(), like.layer_sizes()
    odd = sorted(mine.keys() ^ its.keys()) if stored.vector.scope != "weight" or not mine.keys() & its.keys() else []
    if odd:
        raise DifferentPointError(
            f"{stored.path} and {like.path} cover different layers; only one of them has {odd[0]}"
        )
    for layer in mine.keys() & its.keys():
        if mine[layer] != its[layer]:
            raise DifferentPointError(
                f"layer '{layer}' is {mine[layer]} in {stored.path} and {its[layer]} in {like.path}: they are of "
                "different base models"
            )


def _stored_factors(vector: TaskVector) -> tuple[StoredTensors, dict[str, tuple[int, float]]]:
    """The factors of an adapter by their names in its file, and (rank, alpha) of every layer.

    In weight space the factors are the vector's, which may lie in files: one layer is in memory at a time.
    """
    made: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    sizes = {}
    like = shapes(vector.deltas)
    for layer, scaling in vector.scalings.items():
        a, b = (f"base_model.model.{layer}.lora_{kind}.weight" for kind in "AB")
        if vector.scope == "weight" and scaling > 0.0:
            names[a], names[b] = f"{layer}.dA", f"{layer}.dB"
            rank = len(like[f"{layer}.dA"])
        else:
            A, B = (_narrowed(factor, like[f"{layer}.dB"].dtype) for factor in factors_of(vector, layer))
            if scaling <= 0.0:  # of a multiple; servers expect an alpha above 0
                B, scaling = scaling * B, 1.0
            made[a], made[b], rank = A, B, len(A)
        sizes[layer] = (rank, scaling * rank)
    return joined(made, renamed(vector.deltas, names)), sizes


def _narrowed(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in the vector's own dtype, if that holds it exactly."""
    narrow = factor.to(dtype)
    return narrow if torch.equal(narrow.to(factor.dtype), factor) else factor
