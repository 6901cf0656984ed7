"""`linearize`, `delinearize`, `accelerate`: put linlora's ops under a PEFT model, in place, and take them out again."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from peft import PeftModel
from torch import nn

from linlora.layers.adapter_names import accept_rows, refuse_rows
from linlora.layers.calls import PATCHED, pefts_forward_is_its_own
from linlora.layers.conversion import convert_back, convert_layer
from linlora.layers.finding import UnsupportedLayerError, check_factors, check_unmerged, lora_layers
from linlora.layers.lora_linear import ConvertedLoraLinear, converted_layers
from linlora.layers.model_scope import check_model_scope, check_scope, enter_model_scope, leave_model_scope
from linlora.layers.peft_merging import guard_merging, unguard_merging
from linlora.layers.peft_saving import guard_saving, unguard_saving
from linlora.layers.report import Report, report
from linlora.layers.restoring import restoring
from linlora.layers.sharding import is_sharded


@runtime_checkable
class Linearizable(Protocol):
    """A model that linearizes itself, as a `linlora.routing.RoutedModel` does; the functions here ask it to."""

    def linearize(self, scope: str) -> Any: ...

    def set_scope(self, scope: str) -> None: ...

    def delinearize(self) -> Any: ...


class Point(Protocol):
    """A linearization point that a model can be put at, as a `TaskVector` holds one."""

    def move_point(self, model: PeftModel) -> None: ...


def linearize(model: PeftModel | Linearizable, scope: str = "layer", point: Point | None = None) -> Report:
    """Linearize a PEFT model in its LoRA adapters, in place, at the adapters' current values.

    Layer scope (arXiv 2310.04742 as its code trains it): each layer returns
    ``y + y_t = x Wᵀ + b + s[(x A0ᵀ)(B0 + dB)ᵀ + (x dAᵀ) B0ᵀ]`` with (A0, B0) the values the adapter has now, trained or
    not, and (dA, dB) zero and trainable. Activations between layers stay nonlinear, and the result is a LoRA adapter.

    Model scope (its equation 4): the whole network is linearized, ``F(δ) = f(x; φ0) + J(x; φ0) δ`` with δ all (dA, dB).
    Two streams flow through the network; outputs and the loss (also with `labels`) are those of F, and so are gradients
    with respect to δ. For inputs that ask for a gradient, backward raises. What the network's code and hooks `detach()`
    goes on as a constant of f(x; φ0), and is F's to whoever keeps it. It stays two streams: it does not fold into
    weights.

    The function of the model is unchanged until it is trained. No weight is copied; every adapter of the model is
    linearized, each at its own point; `modules_to_save` are trained as they are, at model scope on top of F.

    Args:
        model: a PeftModel with LoRA adapters (nn.Linear or transformers Conv1D targets), or a RoutedModel, which is
            linearized at the means of its inventories (`linlora.routing.scope`).
        scope: "layer" or "model".
        point: a TaskVector at whose linearization point the active adapter is put first, to resume or evaluate
            vectors of an earlier run.

    Returns: a Report; print it. At model scope, print it again after a step: functions without a rule are counted.

    Raises:
        TypeError: `model` is not a PeftModel; UnsupportedLayerError (a TypeError): a LoRA layer of another kind.
        NoLoraLayerError: there is no LoRA layer.
        ValueError: unknown scope, merged or already linearized adapters, NaN in an adapter, a point that does not fit;
            at model scope an attention implementation without tangents, or parameters that train beside the adapter.

    >>> import linlora
    >>> report = linlora.linearize(linlora.testing.tiny_model("bert"), scope="model")
    >>> {layer.state for layer in report.layers}
    {'short'}
    """
    check_scope(scope)
    if isinstance(model, Linearizable) and point is None:
        return model.linearize(scope)
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"linearize takes a PeftModel, got {type(model).__name__}: wrap it with peft.get_peft_model(model, "
            "LoraConfig(...)) or load one with PeftModel.from_pretrained(model, directory)"
        )
    _check_whole(model, "linearize", "linearize it before fully_shard, or before accelerate or the Trainer prepare it")
    layers = lora_layers(model)
    if not pefts_forward_is_its_own():
        raise UnsupportedLayerError(
            f"{PATCHED}, and a linearized layer would not run it; linearize the model where it is PEFT's own"
        )
    for name, layer in layers:
        if isinstance(layer, ConvertedLoraLinear) and layer.linearized:
            raise ValueError(
                f"layer '{name}': adapter {layer.linearized} is linearized already; call delinearize first"
            )
        check_factors(name, layer)
    if scope == "model":
        check_model_scope(model)
    with restoring(model):
        if point is not None:
            point.move_point(model)
        for name, layer in layers:
            converted = convert_layer(layer, name)
            for adapter in converted.lora_A:
                _linearize_adapter(converted, adapter)
        guard_saving(model)
        accept_rows(model)
        guard_merging(model)
        whole_modules = enter_model_scope(model) if scope == "model" else ()
        return report(f"linearized ({scope} scope)", model, layers, whole_modules)


def set_scope(model: PeftModel | Linearizable, scope: str) -> None:
    """Let a linearized model be that of the other scope, in place: the same point, the same (dA, dB), another function.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model, scope="model")
    >>> linlora.set_scope(model, "layer")
    >>> linlora.TaskVector.from_model(model).scope
    'layer'
    """
    check_scope(scope)
    if isinstance(model, Linearizable):
        model.set_scope(scope)
        return
    layers = list(converted_layers(model))
    if not any(layer.linearized for _, layer in layers):
        raise ValueError("set_scope: the model is not linearized; call linlora.linearize(model, scope)")
    if scope == "model" and layers[0][1].stream is None:
        check_model_scope(model)
        with restoring(model):
            enter_model_scope(model)
    elif scope == "layer":
        with restoring(model):
            leave_model_scope(model)


def delinearize(model: PeftModel | Linearizable) -> PeftModel:
    """Give the PEFT model back, in place: stock PEFT layers with the adapter values (A0 + dA, B0 + dB), trainable.

    An adapter that started at B0 = 0 computes the same function as before. Otherwise the bilinear LoRA layer differs
    from its linearization by s dB dA; use `linlora.export` to keep the function.

    >>> import linlora
    >>> from linlora.layers.lora_linear import ConvertedLoraLinear
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> any(isinstance(module, ConvertedLoraLinear) for module in linlora.delinearize(model).modules())
    False
    """
    if isinstance(model, Linearizable):
        return model.delinearize()
    layers = list(converted_layers(model))
    if not layers:
        raise ValueError("delinearize: the model has no linearized or accelerated layer; call linlora.linearize first")
    check_unmerged(layers)
    _check_whole(model, "delinearize", "linlora.export the adapter, which PEFT loads into a whole model")
    with restoring(model):
        leave_model_scope(model)
        for _, layer in layers:
            _delinearize_layer(layer)
        unguard_saving(model)
        refuse_rows(model)
        unguard_merging(model)
    return model


def accelerate(model: nn.Module) -> Report:
    """Run a plain (not linearized) PEFT LoRA model on linlora's ops, in place: the same function, A and B trained.

    Plain LoRA is the op with B0 = 0, A0 = A trainable and dB = B. Raises like `linearize`; `delinearize` undoes it.

    >>> import linlora
    >>> {layer.state for layer in linlora.accelerate(linlora.testing.tiny_model("bert")).layers}
    {'plain'}
    """
    layers = lora_layers(model)
    with restoring(model):
        for name, layer in layers:
            convert_layer(layer, name)
        if isinstance(model, PeftModel):
            guard_saving(model)
            accept_rows(model)
        guard_merging(model)
        return report("accelerated (plain LoRA)", model, layers)


def _linearize_adapter(layer: ConvertedLoraLinear, adapter: str) -> None:
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if not B.detach().any():
        layer.states[adapter] = "short"
    else:
        layer.states[adapter] = "pair"
        layer.lora_dA[adapter] = nn.Parameter(torch.zeros_like(A), requires_grad=B.requires_grad)
        layer.lora_dB[adapter] = nn.Parameter(torch.zeros_like(B), requires_grad=B.requires_grad)
    layer._freeze_point()


def _delinearize_layer(layer: ConvertedLoraLinear) -> None:
    for adapter in layer.linearized:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        trainable = B.requires_grad
        if adapter in layer.pairs:
            dA, dB = layer.lora_dA.pop(adapter), layer.lora_dB.pop(adapter)
            A.data.add_(dA.data)
            B.data.add_(dB.data)
            trainable = dB.requires_grad
        A.requires_grad_(trainable)
        B.requires_grad_(trainable)
    convert_back(layer)


def _check_whole(model: nn.Module, action: str, remedy: str) -> None:
    if is_sharded(model):
        raise ValueError(f"{action}: the model is sharded (FSDP2), and {action} would replace its parameters; {remedy}")
