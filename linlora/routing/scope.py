"""Linearizes a routed model at the mean of its inventories, at the scope of a layer or of the whole model.

With the offsets dA_s, dB_s of the skills from their mean (A0, B0), a layer is linear in its weights w, and uniform
weights give exactly the mean adapter. At model scope the whole network is linear: F(w) = f(φ0) + J Σ_s w_s δ_s.

Uniform routing computes the same before and after; other weights, the first order around the mean. Nothing changes
where all B are zero, as in a fresh inventory.
"""

from __future__ import annotations

from torch import nn

from linlora.layers.model_scope import (
    check_attention,
    check_order,
    check_scope,
    check_trained,
    enter_model_scope,
    leave_model_scope,
)
from linlora.routing.routed_lora_linear import RoutedLoraLinear
from linlora.routing.structure import RoutedStructure
from linlora.storage.tensors import finite
from linlora.stream import head


def linearize(model: RoutedStructure, scope: str) -> None:
    """Linearize a routed model at the means of its inventories, in place."""
    _check(model, scope)
    for layer in model.routed_layers:
        if layer.selector.apart:
            raise ValueError(
                f"layer '{layer.layer_name}': its skills are adapters trained apart, whose factors have no mean to "
                "linearize around; read them with the adapter they started from: linlora.formats.read(adapter, "
                "point=start)"
            )
        if not all(finite(skills) for skills in layer.skills()):
            raise ValueError(
                f"layer '{layer.layer_name}': a skill holds NaN or infinity, and the mean, which all skills are "
                "linearized around, would too"
            )
    for layer in model.routed_layers:
        layer.linearize()
    if scope == "model":
        _enter(model)


def set_scope(model: RoutedStructure, scope: str) -> None:
    """Put a linearized routed model at a scope: the same inventories, another function."""
    if scope_of(model) is None:
        raise ValueError("set_scope: the model is not linearized; call linlora.linearize(model, scope)")
    _check(model, scope)
    leave(model)
    if scope == "model":
        _enter(model)


def leave(model: RoutedStructure) -> None:
    """Carry one stream of activations again."""
    leave_model_scope(model)
    model.whole_modules = ()


def delinearize(model: RoutedStructure) -> None:
    """Give every skill its plain factors (A0 + dA_s, B0 + dB_s), in place."""
    leave(model)
    for layer in model.routed_layers:
        layer.delinearize()


def scope_of(model: RoutedStructure) -> str | None:
    """ "layer" or "model" of a linearized model, None of a plain one."""
    if all(layer.state == "plain" for layer in model.routed_layers):
        return None
    return "layer" if model.layers[0].stream is None else "model"


def _check(model: RoutedStructure, scope: str) -> None:
    check_scope(scope)
    other = [layer for layer in model.layers if not isinstance(layer, RoutedLoraLinear)]
    if other:
        raise ValueError(f"layer '{other[0].layer_name}': a mixture of dyadic experts is not linearized")
    if scope == "layer":
        return
    check_attention(model)
    whole = _trained_modules(model)
    check_order(model.model, whole, RoutedLoraLinear, "inventory")
    gates = [layer.layer_name for layer in model.routed_layers if layer.selector.reads == "input"]
    if gates:
        raise ValueError(
            f"model scope: the weights of layer '{gates[0]}' depend on its input, so the network is not linear in what "
            "trains; use scope='layer', or a selector that routes by task"
        )
    beside = [p for module in (model.selectors, *whole) for p in module.parameters()]
    check_trained(model, [*model.skills(), *beside], "inventories")


def _enter(model: RoutedStructure) -> None:
    model.whole_modules = enter_model_scope(model)
    for module in _trained_modules(model):
        module.register_forward_pre_hook(head.collapse_inputs, with_kwargs=True)


def _trained_modules(model: RoutedStructure) -> list[nn.Module]:
    return [model.model.get_submodule(name) for name in model.modules_to_save]
