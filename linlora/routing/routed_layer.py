"""The base of routed layers: the sizes of an inventory, the checks, the calls of the frozen layer.

The op reads the weight of the base layer. Where its call is more than that product (hooks, a forward of its own:
`linlora.layers.calls`), it is called, with a warning, and the update is added.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from linlora.layers.adapters import check_input
from linlora.layers.calls import beyond_product, hooks_of_all_modules, is_product
from linlora.ops.checks import autocast_input
from linlora.routing.context import Context, Routing
from linlora.stream import DualTensor, Stream


@dataclass(frozen=True)
class LayerSizes:
    """The inventory of one layer: S skills of rank r in Q heads, the scaling s of their update and its dropout."""

    n_skills: int
    n_heads: int
    rank: int
    scaling: float
    dropout: float = 0.0

    def description(self) -> dict[str, Any]:
        return asdict(self)


def check_linear(name: str, layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a layer whose weight is a plain matrix; a ValueError for any other."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        sizes = layer.out_features, layer.in_features
        if layer.weight.is_floating_point() and tuple(layer.weight.shape) == sizes:
            return sizes
    raise ValueError(
        f"layer '{name}' is a {type(layer).__name__}, whose weight is no plain matrix of its inputs and outputs; only "
        "nn.Linear and transformers' Conv1D can be routed, so leave it out"
    )


class RoutedLayer(nn.Module):
    """A frozen linear layer with a low-rank update that depends on the routing of the batch.

    Attributes:
        layer_name: its name in the base model. base_layer: the nn.Linear or Conv1D it replaces.
        context: holds the routing of the running batch.
        stream: at model scope, the stream of the model.
    """

    base_layer: Any
    stream: Stream | None

    def __init__(self, name: str, base_layer: nn.Module, context: Context, sizes: LayerSizes) -> None:
        super().__init__()
        self.out_features, self.in_features = check_linear(name, base_layer)
        self.layer_name, self.base_layer, self.context, self.stream = name, base_layer, context, None
        self.sizes = sizes

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which some models ask their layers for."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def _matrix(self) -> Tensor:
        """The frozen weight as (N, K)."""
        return self.weight.t() if isinstance(self.base_layer, Conv1D) else self.weight

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of the trained parameters: the weight's, but float32 for a half-precision one."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if self.context.disabled:
            return self.base_layer(x)
        routing = self.context.routing
        if routing is None:
            raise RuntimeError(
                f"layer '{self.layer_name}': no batch is being routed. Call the routed model itself, "
                "routed(**inputs, task_ids=...), not the model inside it. If this came up in backward, the layer is "
                "recomputed: checkpoint with routed.gradient_checkpointing_enable(), or with torch.utils.checkpoint("
                "..., use_reentrant=False, context_fn=routed.checkpoint_contexts)"
            )
        primal = autocast_input(x.primal if isinstance(x, DualTensor) else x)
        check_input(self.layer_name, primal, self._matrix)
        if is_product(self.base_layer) and not hooks_of_all_modules():
            return self.adapted(x, routing, self._matrix, self.bias)
        why = "has hooks, those of all modules" if is_product(self.base_layer) else beyond_product(self.base_layer)
        warnings.warn(
            f"layer '{self.layer_name}': its base layer {why}, so it is called and the update added: two steps, "
            "not one op",
            stacklevel=2,
        )
        return self.base_layer(x) + self.adapted(x, routing, self.weight.new_zeros(()).expand_as(self._matrix), None)

    def adapted(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b and the update of the layer."""
        raise NotImplementedError
