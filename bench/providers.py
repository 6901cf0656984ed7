"""Who is measured. Every provider builds its job from the same tensors, so that only the way of computing differs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

import linlora
from linlora import baselines
from linlora.ops import backends

from . import layers, routing, streams
from .cases import Case, LayerOp, RoutingOp, Scope, StreamOp
from .data import Data, LayerData, RoutedData, StreamData, random_data
from .job import Job, Layer, LayerJob
from .models import ModelJob

Function = Literal["frozen", "plain", "adapters", "linearized", "routed", "network"]

_LAYER_OPS: tuple[LayerOp, ...] = ("linearized_lora_linear", "lora_linear")
_STREAM_OPS: tuple[StreamOp, ...] = (
    "linear", "attention", "layer_norm", "rms_norm", "activation", "gated_activation",
)  # fmt: skip
_ROUTING: tuple[RoutingOp, ...] = ("routed_lora_linear",)
_BOTH: tuple[Scope, ...] = ("layer", "model")


@dataclass(frozen=True)
class Provider:
    """One way of computing a layer, an op of model scope or a training step, each built by a function (None: it has no
    such case).

    `function` says what it computes, hence what it is checked against: the frozen layer or model, or the primal of an
    op, alone; plain LoRA at the adapter's current values, of one adapter or of one a task; the linearization of every
    layer (a mixed batch is routed instead), or of the whole network.
    `ops` are those it serves besides whole models, `scopes` the cases of whole models. `package` is what it needs
    installed beside linlora; such a provider runs on a GPU only.
    """

    name: str
    label: str
    function: Function
    layer: Callable[[LayerData], Layer] | None = None
    stream: Callable[[StreamData], Layer] | None = None
    model: Callable[[Any], nn.Module] | None = None
    routing: Callable[[RoutedData], Layer] | None = None
    ops: tuple[str, ...] = ()
    scopes: tuple[Scope, ...] = ()
    backend: str | None = None
    compiled: bool = False
    package: str | None = None

    def serves(self, case: Case) -> bool:
        """Whether it computes such a case at all."""
        if case.kind == "model":
            return case.scope in self.scopes and not self.compiled
        if case.dropout and self.backend is None and self.function != "frozen":
            return False  # it draws another mask
        return case.op in self.ops and not (self.compiled and case.kind in ("stream", "routing"))

    @property
    def runs_kernels(self) -> bool:
        """Whether its ops are kernels of linlora."""
        return self.backend is not None and self.backend != "torch"

    def obstacle(self, case: Case, device: torch.device) -> str | None:
        """Why this provider has no time for a case on a device; None when it has."""
        if not self.serves(case):
            return "it computes something else"
        if (self.runs_kernels or self.package) and device.type not in backends.DECIDED:
            return (
                "times of kernels mean something on a GPU only (on the CPU they are interpreted or emulated, for tests)"
            )
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"not installed: pip install {self.package}"
        if self.backend is None:
            return None
        op = "linearized_lora_linear" if case.kind == "model" else case.op
        dtype = getattr(torch, case.dtype)
        return backends.unavailable(self.backend, device) or backends.refusal(
            self.backend, op, dtype, case.rank, case.dropout > 0.0
        )

    def job(self, case: Case, device: torch.device, data: Data | None = None) -> Job:
        """The job of a case; `data` is shared by the providers of a layer or an op."""
        if case.kind == "model":
            assert self.model is not None
            return ModelJob(case, device, self.model, self.backend, train=self.function != "frozen")
        data = random_data(case, device) if data is None else data
        build = getattr(self, case.kind)
        return LayerJob(build(data), data, case.phase, self.backend, self.compiled)


def _untouched(model: nn.Module) -> nn.Module:
    """A model that is measured as it comes."""
    return model


def _linearized(model: PeftModel, scope: Scope) -> nn.Module:
    linlora.linearize(model, scope)
    return model


FLOOR = Provider(
    "frozen", "frozen nn.Linear", "frozen", layers.frozen, streams.primal, _untouched, routing.frozen,
    (*_LAYER_OPS, *_STREAM_OPS, *_ROUTING), _BOTH,
)  # fmt: skip
TORCH = Provider(
    "linlora-torch", "linlora torch", "linearized", layers.linearized, streams.fused,
    partial(_linearized, scope="layer"), routing.routed, (*_LAYER_OPS, *_STREAM_OPS, *_ROUTING), _BOTH,
    backend="torch",
)  # fmt: skip
_TORCH_MODEL = Provider(
    "linlora-model-torch", "linlora torch, model scope", "network", model=partial(_linearized, scope="model"),
    scopes=("model",), backend="torch",
)  # fmt: skip
_OURS = [
    TORCH,
    replace(TORCH, name="linlora-triton", label="linlora triton", backend="triton"),
    replace(TORCH, name="linlora-cuda", label="linlora cuda", backend="cuda", ops=_LAYER_OPS),
    _TORCH_MODEL,
    replace(_TORCH_MODEL, name="linlora-model-triton", label="linlora triton, model scope", backend="triton"),
]
_LAYER_PEERS = [
    Provider(
        "functorch-all", "jvp all", "linearized", partial(layers.functorch, over="all"),
        model=partial(baselines.linearize_with_functorch, over="all"), ops=_LAYER_OPS, scopes=("layer",),
    ),
    Provider(
        "functorch-ab", "jvp A,B", "linearized", partial(layers.functorch, over="adapter"),
        model=partial(baselines.linearize_with_functorch, over="adapter"), ops=_LAYER_OPS, scopes=("layer",),
    ),
    Provider(
        "peft", "PEFT LoRA", "plain", layers.peft, model=_untouched, routing=routing.one_adapter,
        ops=("linearized_lora_linear", *_ROUTING), scopes=_BOTH,
    ),
    Provider("addmm", "addmm LoRA", "plain", layers.addmm, ops=("linearized_lora_linear",)),
]  # fmt: skip
_MODEL_PEERS = [
    Provider(
        "functorch", "torch.func.jvp", "network", stream=streams.functorch, model=baselines.FunctorchModel,
        ops=_STREAM_OPS, scopes=("model",),
    ),
    Provider(
        "jvp-flash", "jvp_flash_attention", "network", stream=streams.jvp_flash, ops=("attention",),
        package="jvp_flash_attention",
    ),
]  # fmt: skip
_ROUTING_PEERS = [
    Provider("poly", "PEFT Poly", "routed", routing=routing.poly, ops=_ROUTING),
    Provider("peft-loop", "PEFT loop", "adapters", routing=routing.loop, ops=_ROUTING),
]
EAGER = [FLOOR, *_OURS, *_LAYER_PEERS, *_MODEL_PEERS, *_ROUTING_PEERS]
COMPILED = [
    replace(provider, name=f"{provider.name}-compiled", label=f"{provider.label} compiled", compiled=True)
    for provider in (FLOOR, TORCH, *_LAYER_PEERS)
]
PROVIDERS = {provider.name: provider for provider in (*EAGER, *COMPILED)}


def providers(names: tuple[str, ...] = (), compiled: bool = False) -> list[Provider]:
    """The providers of a run, the floor always among them. Raises ValueError for a name that does not exist."""
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"unknown provider {unknown[0]!r}: choose among {', '.join(PROVIDERS)}")
    if names:
        return [provider for provider in PROVIDERS.values() if provider.name in names or provider is FLOOR]
    return [*EAGER, *(COMPILED if compiled else ())]
