"""`linearize`, `delinearize`, `accelerate`: put the fused ops under a PEFT model, in place, and take them out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from linlora.layers import folding
from linlora.layers.adapter_names import accept_rows, refuse_rows
from linlora.layers.calls import PATCHED, pefts_forward_is_its_own
from linlora.layers.conversion import fuse_layer, unfuse_layer, unsupported
from linlora.layers.lora_linear import FusedLoraLinear, fused_layers
from linlora.layers.model_scope import check_model_scope, enter_model_scope, leave_model_scope
from linlora.layers.peft_merging import guard_merging, unguard_merging
from linlora.layers.quantized import QuantizedLoraLinear
from linlora.layers.restoring import leave_to_class, restore_on_error, restoring
from linlora.layers.sharding import check_there, is_sharded
from linlora.layers.vanilla import not_vanilla_config
from linlora.ops import backends

if TYPE_CHECKING:
    from linlora.stream import Stream
    from linlora.stream.fallback import Fallback
    from linlora.vectors.task_vector import TaskVector


class UnsupportedLayerError(TypeError):
    """A LoRA layer of the model cannot be linearized; the message names each with the reason and the remedy."""


class NoLoraLayerError(ValueError):
    """The model holds no LoRA layer; the message lists the layers LoRA could be put on."""


@dataclass(frozen=True)
class LayerReport:
    """One layer and adapter, and how it runs. `state` is 'plain', 'short' or 'pair' (linlora.layers.lora_linear)."""

    name: str
    adapter: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    state: str
    backend: str


@dataclass(frozen=True)
class Report:
    """What `linearize` or `accelerate` did. `print(report)` is the readable form."""

    action: str
    layers: tuple[LayerReport, ...]
    left_alone: tuple[tuple[str, str], ...]
    trainable: int
    fused_modules: tuple[str, ...] = ()
    stream: Stream | None = field(default=None, repr=False)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """At model scope, the functions that ran without a rule so far: where, how often, seconds; dearest first."""
        found = () if self.stream is None else self.stream.fallbacks.values()
        return tuple(sorted(found, key=lambda fallback: -fallback.seconds))

    def __str__(self) -> str:
        lines = [f"linlora: {self.action} {len({layer.name for layer in self.layers})} LoRA layers"]
        kinds = Counter(
            (_family(layer.name), layer.in_features, layer.out_features, layer.rank, layer.scaling, layer.adapter)
            for layer in self.layers
        )
        for (family, k, n, rank, scaling, adapter), count in kinds.items():
            lines.append(
                f"  {count:4d} x {family:16s} {k} -> {n}, rank {rank}, scaling {scaling:g}, adapter '{adapter}'"
            )
        states = Counter(layer.state for layer in self.layers)
        lines += [f"  {count:4d} {_STATES[state]}" for state, count in states.items()]
        lines += [f"  backend: {', '.join(sorted({layer.backend for layer in self.layers}))}"]
        if self.fused_modules:
            lines += [f"  fused as a whole: {len(self.fused_modules)} x {', '.join(_families(self.fused_modules))}"]
        lines += [f"  without a rule, by forward mode: {fallback}" for fallback in self.fallbacks]
        lines += [f"  left alone: {name} ({why})" for name, why in self.left_alone]
        lines += [f"  trainable parameters: {self.trainable:,}" + ("" if self.trainable else _NOTHING_TRAINABLE)]
        return "\n".join(lines)


_STATES = {
    "plain": "plain: A and B train, as in PEFT",
    "short": "start at B0 = 0: y = x Wᵀ + b + s (x A0ᵀ) dBᵀ. dA has no effect, so A is frozen and B alone trains",
    "pair": "start at B0 != 0: A0 and B0 are frozen, dA and dB (lora_dA, lora_dB) train",
}
_NOTHING_TRAINABLE = " (load the adapter with is_trainable=True, or call model.set_adapter(name), to train it)"


@runtime_checkable
class Linearizable(Protocol):
    """A model that linearizes itself, as a `linlora.routing.RoutedModel` does; the functions here ask it to."""

    def linearize(self, scope: str) -> Any: ...

    def set_scope(self, scope: str) -> None: ...

    def delinearize(self) -> Any: ...


def linearize(model: PeftModel | Linearizable, scope: str = "layer", point: TaskVector | None = None) -> Report:
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
    _check_scope(scope)
    if isinstance(model, Linearizable) and point is None:
        return model.linearize(scope)
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"linearize takes a PeftModel, got {type(model).__name__}: wrap it with peft.get_peft_model(model, "
            "LoraConfig(...)) or load one with PeftModel.from_pretrained(model, directory)"
        )
    _check_whole(model, "linearize", "linearize it before fully_shard, or before accelerate or the Trainer prepare it")
    layers = _lora_layers(model)
    if not pefts_forward_is_its_own():
        raise UnsupportedLayerError(
            f"{PATCHED}, and a linearized layer would not run it; linearize the model where it is PEFT's own"
        )
    for name, layer in layers:
        linearized = [a for a, state in getattr(layer, "states", {}).items() if state != "plain"]
        if linearized:
            raise ValueError(f"layer '{name}': adapter {linearized} is linearized already; call delinearize first")
        _check_factors(name, layer)
    if scope == "model":
        check_there("model scope", model.named_parameters())
        check_model_scope(model)
    with restoring(model):
        if point is not None:
            point.move_point(model)
        for name, layer in layers:
            fused = fuse_layer(layer, name)
            for adapter in fused.lora_A:
                _linearize_adapter(fused, adapter)
            folding.accept_folded_factors(fused)
        folding.save_folded_factors(model)
        restore_on_error(model, *_ADDING)
        accept_rows(model)
        guard_merging(model)
        fused_modules = enter_model_scope(model) if scope == "model" else ()
        return _report(f"linearized ({scope} scope)", model, layers, fused_modules)


def set_scope(model: PeftModel | Linearizable, scope: str) -> None:
    """Let a linearized model be that of the other scope, in place: the same point, the same (dA, dB), another function.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model, scope="model")
    >>> linlora.set_scope(model, "layer")
    >>> linlora.TaskVector.from_model(model).scope
    'layer'
    """
    _check_scope(scope)
    if isinstance(model, Linearizable):
        model.set_scope(scope)
        return
    layers = list(fused_layers(model))
    if not any(state != "plain" for _, layer in layers for state in layer.states.values()):
        raise ValueError("set_scope: the model is not linearized; call linlora.linearize(model, scope)")
    if scope == "model" and layers[0][1].stream is None:
        check_there("model scope", model.named_parameters())
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
    >>> model = linlora.testing.tiny_model("bert")
    >>> _ = linlora.linearize(model)
    >>> any("Fused" in type(module).__name__ for module in linlora.delinearize(model).modules())
    False
    """
    if isinstance(model, Linearizable):
        return model.delinearize()
    layers = list(fused_layers(model))
    if not layers:
        raise ValueError("delinearize: the model has no linearized or accelerated layer; call linlora.linearize first")
    for name, layer in layers:
        if layer.merged_adapters:
            raise ValueError(
                f"layer '{name}': adapters {layer.merged_adapters} are merged; call model.unmerge_adapter()"
            )
    _check_whole(model, "delinearize", "linlora.export the adapter, which PEFT loads into a whole model")
    with restoring(model):
        leave_model_scope(model)
        for _, layer in layers:
            _delinearize_layer(layer)
        folding.save_plain_factors(model)
        leave_to_class(model, *_ADDING)
        refuse_rows(model)
        unguard_merging(model)
    return model


def accelerate(model: nn.Module) -> Report:
    """Run a plain (not linearized) PEFT LoRA model on the fused op, in place: the same function, A and B trained.

    Plain LoRA is the op with B0 = 0, A0 = A trainable and dB = B. Raises like `linearize`; `delinearize` undoes it.

    >>> import linlora
    >>> {layer.state for layer in linlora.accelerate(linlora.testing.tiny_model("bert")).layers}
    {'plain'}
    """
    layers = _lora_layers(model)
    with restoring(model):
        for name, layer in layers:
            fuse_layer(layer, name)
        if isinstance(model, PeftModel):
            restore_on_error(model, *_ADDING)
            accept_rows(model)
        guard_merging(model)
        return _report("accelerated (plain LoRA)", model, layers)


_ADDING = ("add_adapter", "load_adapter")
"""Methods of a PeftModel that change every layer; a layer that refuses leaves the others without the adapter too."""


def _linearize_adapter(layer: FusedLoraLinear, adapter: str) -> None:
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if not B.detach().any():
        layer.states[adapter] = "short"
    else:
        layer.states[adapter] = "pair"
        layer.lora_dA[adapter] = nn.Parameter(torch.zeros_like(A), requires_grad=B.requires_grad)
        layer.lora_dB[adapter] = nn.Parameter(torch.zeros_like(B), requires_grad=B.requires_grad)
    layer._freeze_point()


def _delinearize_layer(layer: FusedLoraLinear) -> None:
    for adapter, state in layer.states.items():
        if state == "plain":
            continue
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        trainable = B.requires_grad
        if state == "pair":
            dA, dB = layer.lora_dA.pop(adapter), layer.lora_dB.pop(adapter)
            A.data.add_(dA.data)
            B.data.add_(dB.data)
            trainable = dB.requires_grad
        A.requires_grad_(trainable)
        B.requires_grad_(trainable)
    folding.refuse_folded_factors(layer)
    unfuse_layer(layer)


def _check_factors(name: str, layer: Any) -> None:
    """Raise where the factors of a layer's adapters are no parameters, or have no values."""
    for adapter in layer.lora_A:
        computed = [kind for kind in ("lora_A", "lora_B") if "weight" not in getattr(layer, kind)[adapter]._parameters]
        if computed:
            raise UnsupportedLayerError(
                f"layer '{name}': the weight of {computed[0]}['{adapter}'] is computed on every call (a "
                "parametrization, weight_norm, pruning); make it a parameter first "
                "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove)"
            )
        factors = [(f"lora_{kind}", getattr(layer, f"lora_{kind}")[adapter].weight) for kind in "AB"]
        check_there(f"layer '{name}'", [(f"{kind} of adapter '{adapter}'", factor) for kind, factor in factors])
        for kind, factor in factors:
            if not torch.isfinite(factor).all():
                raise ValueError(f"layer '{name}': {kind} of adapter '{adapter}' holds NaN or infinity")


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name in the base model, layer) of every LoRA layer; raises when there is none, or one that is not supported."""
    layers = [
        (name.removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
    if not layers:
        candidates = _families(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        raise NoLoraLayerError(
            f"{type(model).__name__} has no LoRA layer. Linear layers LoraConfig(target_modules=[...]) could name: "
            f"{', '.join(candidates) or 'none'}"
        )
    configs = getattr(model, "peft_config", {})
    refused = [
        f"  adapter '{name}': {why}" for name, c in configs.items() if (why := not_vanilla_config(c, True)) is not None
    ]
    refused += [f"  '{name}': {why}" for name, layer in layers if (why := unsupported(layer)) is not None]
    if refused:
        raise UnsupportedLayerError(
            "these LoRA layers cannot be linearized; leave them out of target_modules (or list them in "
            "exclude_modules), or create them as vanilla LoRA:\n" + "\n".join(refused)
        )
    for name, layer in layers:
        if layer.merged_adapters:
            raise ValueError(
                f"layer '{name}': adapters {layer.merged_adapters} are merged; call model.unmerge_adapter()"
            )
    return layers


def _report(
    action: str, model: nn.Module, layers: list[tuple[str, Any]], fused_modules: tuple[str, ...] = ()
) -> Report:
    rows = [
        LayerReport(
            name, adapter, layer.in_features, layer.out_features, layer.r[adapter], layer.scaling[adapter],
            layer.states[adapter], _backend(layer),
        )
        for name, layer in layers
        for adapter in layer.lora_A
    ]  # fmt: skip
    stream = layers[0][1].stream
    how = "trained as it is" if stream is None else "trained as it is, on the linearized features"
    left_alone = [
        (name.removeprefix("base_model.model."), f"{type(module).__name__}: {how}, not part of a TaskVector")
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    return Report(action, tuple(rows), tuple(left_alone), _trainable(model.parameters()), fused_modules, stream)


def _backend(layer: FusedLoraLinear) -> str:
    if isinstance(layer, QuantizedLoraLinear):
        return f"quantized base ({layer.kind}): its own forward and a low-rank update, in place of the fused product"
    return backends.explain(device=layer.weight.device).backend


def _trainable(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def _check_scope(scope: str) -> None:
    if scope not in ("layer", "model"):
        raise ValueError(f"unknown scope {scope!r}: choose 'layer' or 'model'")


def _check_whole(model: nn.Module, action: str, remedy: str) -> None:
    if is_sharded(model):
        raise ValueError(f"{action}: the model is sharded (FSDP2), and {action} would replace its parameters; {remedy}")


def _families(names: Iterable[str]) -> list[str]:
    return sorted({_family(name) for name in names})


def _family(name: str) -> str:
    return name.rsplit(".", 1)[-1]
