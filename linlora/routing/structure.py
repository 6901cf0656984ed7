"""The structure of a routed model: its layers, their inventories and selectors, the content of its state dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from linlora.layers.restoring import restoring
from linlora.routing.context import Context
from linlora.routing.dyadic import DyadicLoraLinear
from linlora.routing.routed_layer import LayerSizes, RoutedLayer
from linlora.routing.routed_lora_linear import RoutedLoraLinear
from linlora.routing.selectors import Selector
from linlora.routing.signature import SignedForward


class Inventory(NamedTuple):
    """The description of one layer's skills: their sizes, and the name of its selector (None: dyadic experts)."""

    sizes: LayerSizes
    selector: str | None


class RoutedStructure(nn.Module):
    """The parts of a `RoutedModel`: layers with inventories, selectors, modules trained as a whole.

    Args:
        model: the base model; its layers are replaced, in place, and its parameters frozen.
        layers: the inventory of every layer that gets one, by the layer's name.
        selectors: the selectors, by name.
        modules_to_save: names of modules trained as a whole, as in PEFT: a classification head.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Inventory],
        selectors: Mapping[str, Selector],
        modules_to_save: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model, self.context = model, Context()
        self.forward = SignedForward(self)
        self.inventories, self.modules_to_save = dict(layers), tuple(modules_to_save)
        self.selector_names = tuple(selectors)
        self.selectors = nn.ModuleList(selectors.values())
        self.whole_modules: tuple[str, ...] = ()
        with restoring(model):
            self.layers = tuple(self._made(name, *inventory) for name, inventory in layers.items())
            model.requires_grad_(False)
            for layer in self.layers:
                name, _, attribute = layer.layer_name.rpartition(".")
                parent = model.get_submodule(name)
                setattr(parent, attribute, layer.train(model.training))
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # In eval mode it reads the weights of its layers without calling them, unless they have hooks.
                    layer.register_forward_pre_hook(_be_called)
            for name in modules_to_save:
                model.get_submodule(name).requires_grad_(True)
            self.train(model.training)
            self.register_state_dict_post_hook(_drop_base)
            self.register_load_state_dict_post_hook(_ignore_base)

    def _made(self, name: str, sizes: LayerSizes, selector: str | None) -> RoutedLayer:
        base_layer = self.model.get_submodule(name)
        if selector is None:
            return DyadicLoraLinear(name, base_layer, self.context, sizes)
        return RoutedLoraLinear(name, base_layer, self.context, self.selector_by_name[selector], sizes)

    @property
    def routed_layers(self) -> tuple[RoutedLoraLinear, ...]:
        """The layers that mix an inventory by a selector."""
        return tuple(layer for layer in self.layers if isinstance(layer, RoutedLoraLinear))

    @property
    def n_tasks(self) -> int:
        """How many tasks the selectors know; 0 where nothing depends on the task."""
        return max((s.sizes.n_tasks for s in self.selector_by_name.values() if s.reads == "task"), default=0)

    @property
    def selector_by_name(self) -> dict[str, Selector]:
        """The selectors by the name of what they are for: a layer, a block, or '' for the model."""
        return dict(zip(self.selector_names, cast(Iterable[Selector], self.selectors), strict=True))

    def set_selectors(self, selectors: Mapping[str, Selector]) -> None:
        """Put other selectors in the place of those of the same names."""
        by_name = {**self.selector_by_name, **selectors}
        for name, selector in self.selector_by_name.items():
            if selector.apart and not by_name[name].apart:
                raise ValueError(
                    f"selector '{name}': the skills are adapters trained apart, whose factors a "
                    f"{type(by_name[name]).__name__} would add; give every request its weights, mixture="
                )
        with restoring(self):
            self.selectors = nn.ModuleList(by_name[name] for name in self.selector_names).train(self.training)
            for layer in self.routed_layers:
                layer.set_selector(by_name[self.inventories[layer.layer_name].selector or ""])

    def skills(self) -> Iterator[nn.Parameter]:
        """The parameters of all inventories, without those of selectors and of modules_to_save."""
        for layer in self.layers:
            yield from (parameter for name, parameter in layer.named_parameters() if name.startswith("lora_"))


def base_names(model: RoutedStructure) -> set[str]:
    """The names in the model's state dict that belong to the base model and do not train."""
    own = tuple(f"model.{name}." for name in model.modules_to_save)
    inside = tuple(f"model.{layer.layer_name}." for layer in model.layers)
    frozen = tuple(f"model.{layer.layer_name}.base_layer." for layer in model.layers)
    parameters = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in parameters if not parameter.requires_grad]
    names += [name for name, _ in model.named_buffers()]
    return {
        name
        for name in names
        if name.startswith("model.")
        and not name.startswith(own)
        and (name.startswith(frozen) or not name.startswith(inside))
    }


def _be_called(*_: Any) -> None:
    """A hook that changes nothing."""


def _drop_base(model: RoutedStructure, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in base_names(model):
        state_dict.pop(prefix + name, None)


def _ignore_base(model: RoutedStructure, incompatible: Any) -> None:
    base = tuple(base_names(model))
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.endswith(base)]
