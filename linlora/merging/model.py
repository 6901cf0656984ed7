"""Merges adapters, or a task vector, into the weights of a model in memory."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from linlora.layers.linearize import accelerate
from linlora.layers.lora_linear import converted_layers
from linlora.layers.peft_merging import REMEDY
from linlora.layers.restoring import restoring, uninterrupted
from linlora.layers.sharding import is_sharded
from linlora.layers.sharing import adapted_layers, refuse_shared
from linlora.layers.weights import Pending, Update, check_fold, fold_all, rehearse
from linlora.storage.tensors import finite
from linlora.vectors.task_vector import TaskVector
from linlora.vectors.weight_vector import WeightVector


def merge(model: PeftModel | nn.Module, adapters: list[str] | TaskVector | None = None) -> nn.Module:
    """Fold the active (or the named) adapters into the base weights and return the plain transformers model.

    Or fold a task vector, as what it adds to the weights, into a plain model: merge(base, vector).

    W + ΔW is summed in fp32 and rounded to W's dtype once. In place, like PEFT's `merge_and_unload`: the PeftModel is
    used up. Raises ValueError, leaving the model whole, for an adapter that holds NaN or does not exist, and for a
    weight that another module shares (a tied embedding).

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> type(linlora.merge(model)).__name__
    'BertForSequenceClassification'
    """
    if isinstance(adapters, TaskVector):
        return _merge_vector(model, WeightVector.of(adapters))
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"merge takes a PeftModel, got {type(model).__name__}; a task of a routed model folds by "
            "linlora.routing.merge_task"
        )
    if is_sharded(model):
        raise ValueError(
            "merge: the weights are sharded (FSDP2), and no process holds them whole; linlora.export the adapter and "
            "merge it in one process"
        )
    unknown = sorted(set(adapters or ()) - set(model.peft_config))
    if unknown:
        raise ValueError(f"merge: no adapter {unknown}; the model has {sorted(model.peft_config)}")
    refuse_shared(model, adapted_layers(model, adapters or model.active_adapters), "merge", REMEDY)
    with uninterrupted(), restoring(model):
        accelerate(model)  # plain layers merge by the same fp32 rule; linearized ones stay as they are
        folds: list[Pending] = []
        for name, layer in converted_layers(model):
            names = [adapter for adapter in adapters or layer.active_adapters if adapter in layer.lora_A]
            for adapter in names:
                if not layer.is_finite(adapter):
                    raise ValueError(
                        f"layer '{name}': adapter '{adapter}' holds NaN or infinity; the model is unchanged"
                    )
            if names:
                folds.append((name, layer.get_base_layer().weight.data, layer.update_that_fits(names)))
                rehearse(*folds[-1][1:])
            layer.merged_adapters.extend(adapters or layer.active_adapters)  # PEFT leaves them to the loop below
        tuner = model.base_model
        merged = type(tuner).merge_and_unload(tuner, adapter_names=adapters)
        fold_all(folds)
        return merged


def _merge_vector(model: nn.Module, vector: WeightVector) -> nn.Module:
    """W ← round(W + ΔW) of the layers of a plain model, in place. Everything is checked before anything is written."""
    if isinstance(model, PeftModel):
        raise TypeError("merge: a vector folds into the plain base model; into an adapter goes linlora.apply")
    if is_sharded(model):
        raise ValueError("merge: the weights are sharded (FSDP2), and no process holds them whole")
    modules = dict(model.named_modules())
    for name, size in vector.sizes().items():
        layer = modules.get(name)
        if not isinstance(layer, (nn.Linear, Conv1D)):
            what = "no such layer" if layer is None else f"a {type(layer).__name__} there, no linear layer"
            raise ValueError(f"merge: the vector is of a layer '{name}', and the model has {what}")
        weight = layer.weight
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"merge: the weight of layer '{name}' is computed from other parameters (weight norm, for one), "
                "and ΔW would be lost; remove the parametrization first"
            )
        shape = size[:2][::-1] if isinstance(layer, Conv1D) else size[:2]
        if not weight.is_floating_point() or weight.element_size() == 1 or weight.is_meta:
            raise ValueError(f"merge: layer '{name}' is {weight.dtype} on {weight.device}, in which ΔW would be lost")
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"merge: layer '{name}' is {size.inputs} -> {size.outputs} in the vector, its weight in the model "
                f"{tuple(weight.shape)}: not the base model the vector is of"
            )
    refuse_shared(model, vector.scalings, "merge", "Untie the weights of the model first, or export the vector")
    folds: list[Pending] = []
    with uninterrupted():
        for name in vector.scalings:
            weight, update = modules[name].weight.data, vector.update(name)
            if not finite(update.A) or not finite(update.B):
                raise ValueError(f"merge: layer '{name}' of the vector holds NaN or infinity; the model is unchanged")
            wide = torch.promote_types(update.A.dtype, weight.dtype)
            A, B = (factor.to(weight.device, wide) for factor in (update.A, update.B))
            folds.append((name, weight, Update(A, B, isinstance(modules[name], Conv1D))))
            check_fold(*folds[-1])
        fold_all(folds)
    return model
