"""Several adapters in one batch, as PEFT asks for them: `adapter_names`, the adapter of every example.

Adapters of any rank, plain and linearized (each at its own point), become factors of one layout, and the layer runs as
one grouped op. A batch that asks for one adapter alone runs as that adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from linlora.ops.checks import autocast_input
from linlora.ops.grouped_lora_linear import grouped_lora_linear
from linlora.ops.grouping import Groups
from linlora.ops.linearized_lora_linear import unchecked
from linlora.weights import stacked

if TYPE_CHECKING:
    from linlora.modules import FusedLoraLinear

BASE = "__base__"
"""PEFT's name for no adapter."""


def mixed_batch(layer: FusedLoraLinear, x: Tensor, names: Sequence[str]) -> Tensor:
    """One layer on a batch x (examples, ..., K) with an adapter name, or '__base__', for every example.

    Another number of names and merged adapters the layer has refused in PEFT's words. Raises ValueError in training and
    at model scope.
    """
    _check(layer)
    asked = [name if name in layer.lora_A else BASE for name in names]
    distinct = sorted(set(asked))
    if distinct == [BASE] or not distinct:
        return layer.base_layer(x)
    weight, bias = layer.matrix, layer.base_layer.bias
    if len(distinct) == 1:
        return unchecked(autocast_input(x), weight, bias, *layer.factors(distinct[0]))
    pairs = [None if name == BASE else stacked(*layer.factors(name), like=weight) for name in distinct]
    rank = max(A.shape[0] for A, _ in filter(None, pairs))
    k, n = weight.shape[1], weight.shape[0]
    empty = (torch.zeros(0, k, device=x.device), torch.zeros(n, 0, device=x.device))
    A = torch.stack([pad(A.t(), (0, rank - A.shape[0])) for A, _ in (pair or empty for pair in pairs)])
    B = torch.stack([pad(B.t(), (0, 0, 0, rank - B.shape[1])) for _, B in (pair or empty for pair in pairs)])
    groups = _groups(tuple(asked), x.shape[:-1].numel(), x.device, torch.is_inference_mode_enabled())
    return grouped_lora_linear(x, weight, bias, A, B, groups, 1.0)


@functools.lru_cache(maxsize=8)
def _groups(names: tuple[str, ...], rows: int, device: torch.device, inference_mode: bool) -> Groups:
    """The groups of the rows of a batch, found again by the other layers that see it. Those made in inference mode
    hold tensors that autograd refuses, so they are others."""
    distinct = sorted(set(names))
    return Groups.of(torch.tensor([distinct.index(name) for name in names], device=device), len(distinct), rows)


def _check(layer: FusedLoraLinear) -> None:
    if layer.training:
        raise ValueError(
            f"layer '{layer.layer_name}': adapter_names is for inference; call model.eval(), or train adapters of "
            "mixed tasks with linlora.routing.route(model, n_tasks, variant='private')"
        )
    if layer.stream is not None:
        raise ValueError(
            f"layer '{layer.layer_name}': adapters linearized at model scope share one point in a batch; put their "
            "task vectors into one model, linlora.routing.from_vectors(model, vectors), and pass task_ids="
        )
