"""Converts PEFT's Poly models to routed models."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.poly import PolyModel
from peft.tuners.poly.layer import Linear as PeftPolyLinear
from peft.utils import AuxiliaryTrainingWrapper

from linlora.layers.calls import is_called_plainly
from linlora.layers.restoring import restoring
from linlora.routing.model import RoutedModel
from linlora.routing.routed_layer import LayerSizes
from linlora.routing.selectors import Poly, Sizes
from linlora.routing.structure import Inventory


def convert(model: PeftModel, linearized: bool = False) -> RoutedModel:
    """Turn a PEFT Poly model into a RoutedModel, in place: the same function, gradients, parameters and samples.

    The parameters are PEFT's own, so an optimizer that holds them goes on. The result takes `task_ids` wherever the
    PEFT model did: when called, as `base_model(...)`, and in `generate`. The PEFT model is used up.

    Checkpoints of PEFT are read by PEFT: ``convert(PeftModel.from_pretrained(base, directory, is_trainable=True))``.

    Args:
        model: a PeftModel with one adapter, an active Poly adapter.
        linearized: linearize it, at layer scope, at the mean of each inventory. (`linlora.linearize(routed, "model")`
            does so at model scope.)

    Raises TypeError for another model, ValueError for several adapters, heads that do not divide a layer, and hooks on
    a Poly layer, which would be lost. An error leaves the model as it was.

    >>> import linlora, peft
    >>> config = peft.PolyConfig(n_tasks=3, n_skills=2, n_splits=4, target_modules=["query", "value"])
    >>> model = peft.get_peft_model(linlora.testing.tiny_base("bert"), config)
    >>> convert(model)(**linlora.testing.tiny_batch("bert"), task_ids=[0, 2, 1]).logits.shape
    torch.Size([3, 3])
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, PolyModel):
        raise TypeError(
            f"convert takes a PeftModel with a Poly adapter (peft.PolyConfig), got {type(model).__name__} of "
            f"{type(getattr(model, 'base_model', None)).__name__}; routing of other models starts with "
            "linlora.routing.route"
        )
    if len(model.peft_config) != 1 or model.active_adapters != list(model.peft_config):
        raise ValueError(
            f"convert takes one adapter, which is active, got {list(model.peft_config)}, active {model.active_adapters}"
            "; the others would be lost: take them off a copy, model.delete_adapter(name)"
        )
    (adapter,) = model.active_adapters
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PeftPolyLinear) and adapter in module.poly_lora_A
    }
    for name, layer in layers.items():
        if not is_called_plainly(layer):
            raise ValueError(
                f"layer '{name}' has hooks or a forward of its own, which would be lost with the Poly layer it is on; "
                "remove it, and put it on the routed layer afterwards"
            )
    asks = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    inventories, selectors = {}, {}
    for name, layer in layers.items():
        skills, heads, rank = layer.n_skills[adapter], layer.n_splits[adapter], layer.r[adapter]
        inventories[name] = Inventory(LayerSizes(skills, heads, rank, 1.0 / rank), name)
        sizes = Sizes(layer.n_tasks[adapter], skills, heads, layer.in_features)
        selectors[name] = Poly(sizes, sampling="relaxed_bernoulli")  # PEFT always samples in training
        selectors[name].logits = layer.poly_router[adapter].module_logits
    wrapped = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    with restoring(model):
        base = model.base_model.unload()
        routed = RoutedModel(base, inventories, selectors, [name.removeprefix("base_model.model.") for name in wrapped])
        for layer in routed.routed_layers:
            source = layers[layer.layer_name]
            layer.lora_A, layer.lora_B = source.poly_lora_A[adapter], source.poly_lora_B[adapter]
        for parameter in routed.parameters():
            parameter.requires_grad_(asks.get(id(parameter), parameter.requires_grad))
        if linearized:
            routed.linearize("layer")
        return routed
