"""Who is measured. Every provider builds its job from the same tensors, so that only the way of computing differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel

import linlora
from linlora import backends, baselines

from . import layers
from .cases import Case
from .data import LayerData, random_layer
from .job import Job, Layer, LayerJob
from .models import ModelJob

Function = Literal["frozen", "plain", "linearized"]


@dataclass(frozen=True)
class Provider:
    """One way of computing a layer.

    `function` says what it computes, hence what it is checked against: the frozen layer, plain LoRA at the adapter's
    current values, or the linearization. `layer` and `model` build it (None: it has no such case); `ops` are the
    ops it serves besides whole models.
    """

    name: str
    label: str
    function: Function
    layer: Callable[[LayerData], Layer]
    model: Callable[[PeftModel], Any] | None = None
    ops: tuple[str, ...] = ("linearized_lora_linear", "lora_linear")
    backend: str | None = None
    compiled: bool = False

    def obstacle(self, case: Case, device: torch.device) -> str | None:
        """Why this provider has no time for a case on a device; None when it has."""
        if case.op == "model" and (self.model is None or self.compiled):
            return "a layer, not a model" if self.model is None else "compiled only for single layers"
        if case.op != "model" and case.op not in self.ops:
            return "plain LoRA has one stream"
        if self.backend == "triton" and device.type != "cuda":
            return "Triton times mean something on a GPU only (the interpreter is for tests)"
        return None if self.backend is None else backends.unavailable(self.backend, device)

    def job(self, case: Case, device: torch.device, data: LayerData | None = None) -> Job:
        """The job of a case; `data` is shared by the providers of a layer case."""
        if case.op == "model":
            assert self.model is not None
            return ModelJob(case, device, self.model, self.backend, train=self.function != "frozen")
        data = random_layer(case, device) if data is None else data
        return LayerJob(self.layer(data), data, case.phase, self.backend, self.compiled)


def _untouched(model: PeftModel) -> None:
    """A model that is measured as it comes."""


FLOOR = Provider("frozen", "frozen nn.Linear", "frozen", layers.frozen, _untouched)
TORCH = Provider(
    "linlora-torch", "linlora torch", "linearized", layers.linearized, linlora.linearize, backend="torch"
)  # fmt: skip
_OURS = [
    TORCH,
    replace(TORCH, name="linlora-triton", label="linlora triton", backend="triton"),
    replace(TORCH, name="linlora-cuda", label="linlora cuda", backend="cuda"),
]
_PEERS = [
    Provider(
        "functorch-all", "jvp all", "linearized", partial(layers.functorch, over="all"),
        partial(baselines.linearize_with_functorch, over="all"),
    ),
    Provider(
        "functorch-ab", "jvp A,B", "linearized", partial(layers.functorch, over="adapter"),
        partial(baselines.linearize_with_functorch, over="adapter"),
    ),
    Provider("peft", "PEFT LoRA", "plain", layers.peft, _untouched, ops=("linearized_lora_linear",)),
    Provider("addmm", "addmm LoRA", "plain", layers.addmm, ops=("linearized_lora_linear",)),
]  # fmt: skip
EAGER = [FLOOR, *_OURS, *_PEERS]
COMPILED = [
    replace(provider, name=f"{provider.name}-compiled", label=f"{provider.label} compiled", compiled=True)
    for provider in (FLOOR, TORCH, *_PEERS)
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
