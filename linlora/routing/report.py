"""The report of a routed model: layers, selectors, and the parameters that train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from linlora.layers.report import StreamReport, last_name
from linlora.ops.explanation import explain
from linlora.routing.inventory import in_words
from linlora.routing.routed_layer import RoutedLayer
from linlora.routing.routed_lora_linear import RoutedLoraLinear
from linlora.routing.scope import scope_of
from linlora.routing.structure import RoutedStructure

_STATES = {"plain": "", "short": ", B0 = 0: B alone trains", "pair": ", B0 != 0: offsets from the mean train"}


@dataclass(frozen=True)
class RoutedReport(StreamReport):
    """The parts of a routed model; `print(report)` is the readable form.

    Attributes:
        layers, selectors: the kinds, each a line of text, with their numbers.
        trainable: numbers of trained parameters: "skills", "selectors", "modules_to_save".
        scope: "layer" or "model" of a linearized model, None of a plain one.
    """

    layers: dict[str, int]
    selectors: dict[str, int]
    trainable: dict[str, int]
    scope: str | None
    backend: str
    modules_to_save: tuple[str, ...]

    def __str__(self) -> str:
        how = "" if self.scope is None else f", linearized ({self.scope} scope)"
        lines = [f"linlora: {sum(self.layers.values())} routed layers{how}"]
        lines += [f"  {count:4d} x {kind}" for kind, count in self.layers.items()]
        lines += [f"  {count:4d} x selector {kind}" for kind, count in self.selectors.items()]
        lines += [f"  backend: {self.backend}"]
        lines += self.stream_lines()
        lines += [f"  trained as it is: {name}" for name in self.modules_to_save]
        parts = ", ".join(f"{name} {count:,}" for name, count in self.trainable.items() if count)
        lines += [f"  trainable parameters: {sum(self.trainable.values()):,}" + (f" ({parts})" if parts else "")]
        return "\n".join(lines)


def report(model: RoutedStructure) -> RoutedReport:
    """The report of a routed model as it is now."""
    selectors = (f"{type(s).__name__}({s.extra_repr()})" for s in model.selector_by_name.values())
    device = model.layers[0].weight.device if model.layers else "cpu"
    return RoutedReport(
        layers=dict(Counter(_kind(layer) for layer in model.layers)),
        selectors=dict(Counter(selectors)),
        trainable={
            "skills": _count(model.skills()),
            "selectors": _count(model.selectors.parameters()),
            "modules_to_save": _count(
                p for name in model.modules_to_save for p in model.model.get_submodule(name).parameters()
            ),
        },
        scope=scope_of(model),
        backend=explain("routed_lora_linear", device).backend,
        modules_to_save=model.modules_to_save,
        whole_modules=model.whole_modules,
        stream=model.layers[0].stream if model.layers else None,
    )


def _kind(layer: RoutedLayer) -> str:
    name, sizes = last_name(layer.layer_name), layer.sizes
    skills, state = f"{sizes.n_skills} experts a rank slot", ""
    if isinstance(layer, RoutedLoraLinear):
        skills, state = in_words(sizes.n_skills, sizes.n_heads), _STATES[layer.state]
    features = f"{layer.in_features} -> {layer.out_features}"
    return f"{name:16s} {features}, rank {sizes.rank}, {skills}, scaling {sizes.scaling:g}{state}"


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
