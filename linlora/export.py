"""Leaving linlora: `merge` into a plain transformers model, `export` as an adapter that stock PEFT loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from peft import PeftModel
from torch import nn

from linlora.files import install_file
from linlora.folding import folded_configs, folded_state_dict
from linlora.linearize import accelerate
from linlora.modules import fused_layers
from linlora.sharding import is_sharded, writes
from linlora.task_vector import TaskVector, _one_adapter

TASK_VECTOR_FILE = "task_vector.safetensors"


def merge(model: PeftModel, adapters: list[str] | None = None) -> nn.Module:
    """Fold the active (or the named) adapters into the base weights and return the plain transformers model.

    W + ΔW is summed in fp32 and rounded to W's dtype once. In place, like PEFT's `merge_and_unload`: the PeftModel is
    used up. Raises ValueError, leaving the model whole, when an adapter holds NaN.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> type(linlora.merge(model)).__name__
    'BertForSequenceClassification'
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"merge takes a PeftModel, got {type(model).__name__}")
    if is_sharded(model):
        raise ValueError(
            "merge: the weights are sharded (FSDP2), and no process holds them whole; linlora.export the adapter and "
            "merge it in one process"
        )
    accelerate(model)  # plain layers merge by the same fp32 rule; linearized ones stay as they are
    for name, layer in fused_layers(model):
        for adapter in adapters or layer.active_adapters:
            if adapter in layer.lora_A and not layer.is_finite(adapter):
                raise ValueError(f"layer '{name}': adapter '{adapter}' holds NaN or infinity; the model is unchanged")
    return model.merge_and_unload(adapter_names=adapters)


def export(model: PeftModel, directory: str | os.PathLike, adapter: str | None = None) -> None:
    """Write an adapter (the active one if not named) as a directory that stock PEFT, vLLM or SGLang loads.

    `adapter_model.safetensors` and `adapter_config.json` hold the exact LoRA factors of the layer-scope function, of
    rank r where B0 = 0 and 2r elsewhere; `task_vector.safetensors` holds (dA, dB) and the linearization point, for
    `TaskVector.load`. A plain LoRA adapter has no linearization point, so no vector is written for it: save
    `TaskVector.from_model(model, point=start)` beside it. Each file is replaced in one step.

    Of a model sharded by FSDP2 every process has to call this, and rank 0 writes; under DDP let rank 0 call it.

    >>> import linlora, tempfile, peft
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     linlora.export(model, directory)
    ...     base = linlora.testing.tiny_base("bert")
    ...     print(type(peft.PeftModel.from_pretrained(base, directory)).__name__)
    PeftModel
    """
    adapter = _one_adapter(model, adapter)
    vector = TaskVector.from_model(model, adapter)
    if vector.scope == "model":
        raise ValueError(
            "export: no LoRA adapter has the function of a model linearized at model scope. Save its task vector, "
            "TaskVector.from_model(model).save(path), or export the layer-scope function: "
            "linlora.set_scope(model, 'layer')"
        )
    state_dict = folded_state_dict(model)
    if not writes(model):
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory, prefix=".export."))
    try:
        with folded_configs(model):
            type(model).save_pretrained(model, str(staging), selected_adapters=[adapter], state_dict=state_dict)
        if vector.scope == "layer":
            vector.save(staging / TASK_VECTOR_FILE)
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            install_file(file, directory / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
