"""Makes one adapter of a task of a routed model: exact LoRA factors, a merged model, a PEFT model."""

from __future__ import annotations

import os
import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from linlora.formats.adapter_folder import adapter_folder
from linlora.formats.peft_adapter import TENSOR_FILE
from linlora.layers.calls import LINEAR, beyond_product, is_product
from linlora.layers.folding import with_sizes
from linlora.layers.linearize import linearize
from linlora.layers.restoring import restoring, uninterrupted
from linlora.layers.sharing import refuse_shared
from linlora.layers.weights import Pending, Update, check_fold, fold_all
from linlora.routing.model import RoutedModel
from linlora.routing.scope import scope_of
from linlora.storage.tensor_files import save_tensors
from linlora.storage.tensors import wide
from linlora.vectors.adapters import delta_parameters


@torch.no_grad()
def task_weights(model: RoutedModel, task_id: int | None) -> dict[str, Tensor]:
    """The weights (Q, S) of a task in every layer, by layer name, as in eval mode; for None 1 / S.

    Raises ValueError for a task the model does not know, and where weights depend on the input.

    >>> import linlora
    >>> routed = linlora.routing.route(linlora.testing.tiny_base("bert"), 2, n_skills=4, target_modules=["query"])
    >>> list(task_weights(routed, 1).values())[0].shape
    torch.Size([1, 4])
    """
    if len(model.routed_layers) < len(model.layers):
        raise ValueError("a mixture of dyadic experts weights them by the token: no single adapter has its function")
    if task_id is not None and not 0 <= task_id < max(model.n_tasks, 1):
        known = f"the ids of {model.n_tasks} tasks are 0 to {model.n_tasks - 1}"
        if model.n_tasks == 0:
            known = "its weights depend on no task; pass 0, or None for the mean of the skills"
        raise ValueError(f"task id {task_id} is unknown: {known}")
    weights = {}
    for layer in model.routed_layers:
        selector, sizes = layer.selector, layer.sizes
        if task_id is None and selector.apart:
            raise ValueError(
                f"layer '{layer.layer_name}': its skills are adapters trained apart, which have no mean of their rank; "
                "pass a task id, or fuse the vectors (linlora.fuse)"
            )
        if task_id is None:
            weights[layer.layer_name] = layer.lora_B.new_full((sizes.n_heads, sizes.n_skills), 1.0 / sizes.n_skills)
            continue
        if selector.reads == "input":
            raise ValueError(
                f"layer '{layer.layer_name}': its weights depend on the input, so no single adapter has its function"
            )
        training = selector.training
        try:
            of_task = selector.eval().weights(torch.tensor([task_id], device=layer.weight.device))
        finally:
            selector.train(training)
        assert isinstance(of_task, Tensor)
        weights[layer.layer_name] = of_task[0]
    return weights


def export_task(model: RoutedModel, directory: str | os.PathLike, task_id: int | None) -> None:
    """Write one task (None: the mean of the skills) as a LoRA adapter, which has the same function in stock PEFT.

    The factors are those of the mixture, of rank r, or 2r where the model is linearized at B0 ≠ 0; the modules in
    modules_to_save are written too. Files are replaced as by `linlora.export`.

    Raises ValueError for a task the model does not know, weights that depend on the input, parameters of the base model
    that train, and at model scope, where no LoRA adapter has the function.

    >>> import linlora, tempfile, peft
    >>> routed = linlora.routing.route(linlora.testing.tiny_base("bert"), 2, rank=4, target_modules=["query"])
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     export_task(routed, directory, task_id=1)
    ...     print(type(peft.PeftModel.from_pretrained(linlora.testing.tiny_base("bert"), directory)).__name__)
    PeftModel
    """
    _check_folds(model, "export_task")
    _check_base_is_frozen(model)
    weights = task_weights(model, task_id)
    tensors: dict[str, Tensor] = {}
    for layer in model.routed_layers:
        a, b = (f"base_model.model.{layer.layer_name}.lora_{kind}.weight" for kind in "AB")
        tensors[a], tensors[b] = layer.adapter(weights[layer.layer_name])
    for name in model.modules_to_save:
        for key, tensor in model.model.get_submodule(name).state_dict().items():
            tensors[f"base_model.model.{name}.{key}"] = tensor
    config = _config(model, doubled=True)
    config.inference_mode = True
    config.base_model_name_or_path = getattr(model.model, "name_or_path", None)
    with adapter_folder(directory) as staging:
        config.save_pretrained(staging)
        save_tensors(staging / TENSOR_FILE, tensors, {"format": "pt"})


@torch.no_grad()
def merge_task(model: RoutedModel, task_id: int | None) -> nn.Module:
    """Fold one task (None: the mean of the skills) into the base weights and return the base model.

    W + ΔW is summed in fp32 and rounded once. In place: the routed model is used up. Raises as `export_task`, for NaN,
    and for a weight that another module shares (a tied embedding), leaving the model whole.

    >>> import linlora
    >>> routed = linlora.routing.route(linlora.testing.tiny_base("bert"), 2, rank=4, target_modules=["query"])
    >>> type(merge_task(routed, task_id=1)).__name__
    'BertForSequenceClassification'
    """
    _check_folds(model, "merge_task")
    remedy = "Leave it out of target_modules, or serve the task unmerged, export_task(model, directory, task_id)"
    refuse_shared(model.model, [layer.layer_name for layer in model.routed_layers], "merge_task", remedy)
    _check_products(model)
    weights = task_weights(model, task_id)
    folds: list[Pending] = []
    with uninterrupted(), restoring(model):
        for layer in model.routed_layers:
            A, B = layer.adapter(weights[layer.layer_name])
            dtype = wide(A.dtype, B.dtype, layer.weight.dtype)
            update = Update(A.to(dtype), layer.sizes.scaling * B.to(dtype), isinstance(layer.base_layer, Conv1D))
            folds.append((layer.layer_name, layer.weight.data, update))
            check_fold(*folds[-1])
        merged = model.unload()
        fold_all(folds)
        return merged


def collapse(model: RoutedModel, task_id: int | None = None) -> PeftModel:
    """The mean of the inventory (MHR-μ), or one task, as a PEFT LoRA model that trains on: the same function.

    A plain model becomes a plain PEFT model of rank r; a linearized one a PEFT model linearized at the same point and
    scope, displaced by the mixture of the offsets. In place: the routed model is used up.

    >>> import linlora
    >>> routed = linlora.routing.route(linlora.testing.tiny_base("bert"), 2, rank=4, target_modules=["query"])
    >>> type(collapse(routed)).__name__
    'PeftModel'
    """
    weights, scope = task_weights(model, task_id), scope_of(model)
    layers, config = model.routed_layers, _config(model, doubled=False)
    mixed = {layer.layer_name: layer.mixed(weights[layer.layer_name]) for layer in layers}
    point = {layer.layer_name: (layer.A0, layer.B0) for layer in layers}
    with restoring(model):
        peft_model = get_peft_model(model.unload(), config)
        with torch.no_grad():
            for name, (A, B) in mixed.items():
                layer = peft_model.get_submodule(f"base_model.model.{name}")
                A0, B0 = point[name] if scope is not None else (A, B)
                layer.lora_A["default"].weight.copy_(A0)
                layer.lora_B["default"].weight.copy_(torch.zeros_like(B) if B0 is None else B0)
            if scope is not None:
                linearize(peft_model, scope)
                for key, parameter in delta_parameters(peft_model).items():
                    name, _, kind = key.rpartition(".")
                    value = mixed[name][kind == "dB"]
                    assert value is not None
                    parameter.copy_(value)
        return peft_model.train(model.training)


def _config(model: RoutedModel, doubled: bool) -> LoraConfig:
    """The LoraConfig of one adapter; `doubled` doubles the rank of layers linearized at B0 ≠ 0."""
    sizes = {}
    for layer in model.routed_layers:
        rank = layer.sizes.rank * (2 if doubled and layer.state == "pair" else 1)
        sizes[layer.layer_name] = (rank, layer.sizes.scaling * rank)
    ends = tuple(f".{name}" for name in sizes)
    ambiguous = any(name.endswith(ends) and name not in sizes for name, _ in model.model.named_modules())
    config = LoraConfig(
        # PEFT takes a name for all that end like it, a regular expression for what it matches in full.
        target_modules="|".join(map(re.escape, sizes)) if ambiguous else list(sizes),
        modules_to_save=list(model.modules_to_save) or None,
        fan_in_fan_out=any(isinstance(layer.base_layer, Conv1D) for layer in model.routed_layers),
        lora_dropout=model.routed_layers[0].sizes.dropout,
    )
    return with_sizes(config, sizes)


def _check_folds(model: RoutedModel, action: str) -> None:
    if scope_of(model) == "model":
        raise ValueError(
            f"{action}: no LoRA adapter has the function of a model linearized at model scope, because its tangent "
            "runs through the whole network. Use collapse(model, task_id), or the layer-scope function: "
            "linlora.set_scope(model, 'layer')"
        )


def _check_products(model: RoutedModel) -> None:
    """Refuse base layers whose own forward may use the weight otherwise; hooks stay with the layer."""
    for layer in model.routed_layers:
        base = layer.base_layer
        if type(base) not in LINEAR or (not is_product(base) and "hooks" not in beyond_product(base)):
            raise ValueError(
                f"layer '{layer.layer_name}': its base layer {beyond_product(base)}, so a merged weight may not have "
                "the function of the adapter; serve the task unmerged, export_task(model, directory, task_id)"
            )


def _check_base_is_frozen(model: RoutedModel) -> None:
    apart = tuple(f"{name}." for name in (*model.modules_to_save, *(layer.layer_name for layer in model.layers)))
    own = [name for name, p in model.model.named_parameters() if p.requires_grad and not name.startswith(apart)]
    if own:
        raise ValueError(
            f"export_task: {len(own)} parameters of the base model train, '{own[0]}' first, which the adapter would "
            "not hold; name what trains beside the skills in modules_to_save"
        )
