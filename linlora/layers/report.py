"""The report of `linearize` and `accelerate`: which layers run how, what was left alone and why, what trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from linlora.layers.lora_linear import ConvertedLoraLinear
from linlora.layers.peft_names import base_name
from linlora.layers.quantized import QuantizedLoraLinear
from linlora.ops.explanation import explain

if TYPE_CHECKING:
    from linlora.stream import Stream
    from linlora.stream.fallback import Fallback


@dataclass(frozen=True)
class LayerReport:
    """One layer and adapter, and how it runs.

    `state` is 'plain', 'short' or 'pair' (linlora.layers.adapters), or 'frozen A': a plain one of which B alone trains.
    """

    name: str
    adapter: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    state: str
    backend: str


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """How both streams run through a model at model scope; empty at layer scope.

    Attributes:
        whole_modules: the modules that run as one op, by name.
    """

    whole_modules: tuple[str, ...] = ()
    stream: Stream | None = field(default=None, repr=False)

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """The functions that ran without a rule so far: where, how often, seconds; dearest first."""
        found = () if self.stream is None else self.stream.fallbacks.values()
        return tuple(sorted(found, key=lambda fallback: -fallback.seconds))

    def stream_lines(self) -> list[str]:
        """The lines of the readable form."""
        lines = [f"  without a rule, by forward mode: {fallback}" for fallback in self.fallbacks]
        if self.whole_modules:
            named = ", ".join(last_names(self.whole_modules))
            lines.insert(0, f"  modules run whole, as one op: {len(self.whole_modules)} x {named}")
        return lines


@dataclass(frozen=True)
class Report(StreamReport):
    """The result of `linearize` or `accelerate`, layer by layer. `print(report)` is the readable form."""

    action: str
    layers: tuple[LayerReport, ...]
    left_alone: tuple[tuple[str, str], ...]
    trainable: int

    def __str__(self) -> str:
        lines = [f"linlora: {self.action} {len({layer.name for layer in self.layers})} LoRA layers"]
        kinds = Counter(
            (last_name(layer.name), layer.in_features, layer.out_features, layer.rank, layer.scaling, layer.adapter)
            for layer in self.layers
        )
        for (kind, k, n, rank, scaling, adapter), count in kinds.items():
            lines.append(f"  {count:4d} x {kind:16s} {k} -> {n}, rank {rank}, scaling {scaling:g}, adapter '{adapter}'")
        states = Counter(layer.state for layer in self.layers)
        lines += [f"  {count:4d} {_STATES[state]}" for state, count in states.items()]
        lines += [f"  backend: {', '.join(sorted({layer.backend for layer in self.layers}))}"]
        lines += self.stream_lines()
        lines += [f"  left alone: {name} ({why})" for name, why in self.left_alone]
        lines += [f"  trainable parameters: {self.trainable:,}" + ("" if self.trainable else _NOTHING_TRAINABLE)]
        return "\n".join(lines)


_STATES = {
    "plain": "plain: A and B train, as in PEFT",
    "frozen A": "plain, with A frozen: B alone trains, LoRA-FA",
    "short": "start at B0 = 0: y = x Wᵀ + b + s (x A0ᵀ) dBᵀ. dA has no effect, so A is frozen and B alone trains",
    "pair": "start at B0 != 0: A0 and B0 are frozen, dA and dB (lora_dA, lora_dB) train",
}
_NOTHING_TRAINABLE = " (load the adapter with is_trainable=True, or call model.set_adapter(name), to train it)"


def report(action: str, model: nn.Module, layers: list[tuple[str, Any]], whole_modules: tuple[str, ...] = ()) -> Report:
    """The report of a model whose `layers` (name, layer) were just converted."""
    rows = [
        LayerReport(
            name, adapter, layer.in_features, layer.out_features, layer.r[adapter], layer.scaling[adapter],
            _state(layer, adapter), _backend(layer),
        )
        for name, layer in layers
        for adapter in layer.lora_A
    ]  # fmt: skip
    stream = layers[0][1].stream
    how = "trained as it is" if stream is None else "trained as it is, on the linearized features"
    left_alone = [
        (base_name(name), f"{type(module).__name__}: {how}, not part of a TaskVector")
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Report(action, tuple(rows), tuple(left_alone), trainable, whole_modules=whole_modules, stream=stream)


def _state(layer: ConvertedLoraLinear, adapter: str) -> str:
    state = layer.states[adapter]
    A_trains, B_trains = (of[adapter].weight.requires_grad for of in (layer.lora_A, layer.lora_B))
    return "frozen A" if state == "plain" and B_trains and not A_trains else state


def _backend(layer: ConvertedLoraLinear) -> str:
    if isinstance(layer, QuantizedLoraLinear):
        return f"quantized base ({layer.kind}): its own forward and a low-rank update, in place of one op"
    return explain(device=layer.weight.device).backend


def last_names(names: Iterable[str]) -> list[str]:
    """The distinct names of modules within their parents: 'query' of every layer's attention."""
    return sorted({last_name(name) for name in names})


def last_name(name: str) -> str:
    return name.rsplit(".", 1)[-1]
