"""MoDE: one shared down projection; each of its rank slots chooses among rank-one up projections by the token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from linlora.ops.checks import autocast_input
from linlora.routing.context import Context, Routing
from linlora.routing.routed_layer import LayerSizes, RoutedLayer


class DyadicLoraLinear(RoutedLayer):
    """A layer of a mixture of dyadic experts (MoDE, arXiv 2408.01505), S experts in each of r rank slots::

        y = x Wᵀ + b + s Σ_i (x a_i) Σ_j π_ij(x) b_ij        π_i(x) = softmax_j(R_i x)

    A (r, K) with rows a_i is shared, B (N, r, S) with columns b_ij, and the router R (r, S, K) decides for every token
    and rank slot. Weighting the activations x a_i makes it one LoRA layer of rank r S.

    The router, B and A train; B is zero at first.
    """

    def __init__(self, name: str, base_layer: nn.Module, context: Context, sizes: LayerSizes) -> None:
        super().__init__(name, base_layer, context, sizes)
        if sizes.n_heads != 1:
            raise ValueError(f"layer '{name}': MoDE routes rank slots, not heads; leave n_heads at 1")
        if sizes.dropout:
            raise ValueError(f"layer '{name}': MoDE has no dropout; leave dropout at 0")
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.factor_dtype}
        k, bound = self.in_features, self.in_features**-0.5
        self.lora_A = nn.Parameter(torch.empty(sizes.rank, k, **like).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, sizes.rank, sizes.n_skills, **like))
        self.lora_router = nn.Parameter(torch.empty(sizes.rank, sizes.n_skills, k, **like).uniform_(-bound, bound))

    def adapted(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = autocast_input(x)
        A, B, router = (factor.to(x.dtype) for factor in (self.lora_A, self.lora_B, self.lora_router))
        weights = linear(x, router.flatten(0, 1)).unflatten(-1, router.shape[:2]).softmax(-1)
        c = (linear(x, A).unsqueeze(-1) * weights).flatten(-2)
        bias = None if bias is None else bias.to(x.dtype)
        return linear(x, weight.to(x.dtype), bias) + self.sizes.scaling * linear(c, B.flatten(1))

    def extra_repr(self) -> str:
        return f"{self.sizes.n_skills} experts in each of {self.sizes.rank} rank slots, scaling {self.sizes.scaling:g}"
