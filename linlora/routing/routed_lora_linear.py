"""The routed layer: a frozen linear layer with an inventory of skills, of which every row takes its own mixture.

Its state decides the arguments of the op, as in `linlora.layers.adapters`:

    plain       A, B                   y = x Wᵀ + b + s (x A_z) B_z
    short       A0, B                  linearized at B0 = 0: y = x Wᵀ + b + s (x A0ᵀ) B_z
    pair        A0, B0, A, B           linearized: y = x Wᵀ + b + s [(x A0ᵀ)(B0ᵀ + B_z) + (x A_z) B0ᵀ]

Linearized, A and B are the skills' offsets from the point (A0, B0). At model scope, where the layer has a `stream`, it
returns the primal (the layer at its point) and its tangent as a DualTensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linlora.functional import routed_lora_linear
from linlora.kernels.grouped_problem import GroupedLoraLinear
from linlora.layers.adapters import State
from linlora.ops import dual
from linlora.ops.grouped_lora_linear import grouped_lora_linear
from linlora.ops.mix_inventories import mix_inventories
from linlora.routing.context import Context, Routing
from linlora.routing.inventory import center, in_words, skill
from linlora.routing.routed_layer import LayerSizes, RoutedLayer
from linlora.routing.selectors import Selector
from linlora.stream.evaluation import unrecorded
from linlora.stream.tensor import refuse_inside_function


class RoutedLoraLinear(RoutedLayer):
    """A linear layer with S skills of rank r in Q heads: A (Q, S, K/Q, r) and B (Q, S, r, N/Q).

    Attributes:
        lora_A, lora_B: the inventory. lora_A is None in state "short", where it has no effect.
        A0 (r, K), B0 (N, r): the linearization point; None where there is none.
        selector: decides the weights of the skills. Layers may share it; it belongs to the model.
    """

    selector: Selector

    def __init__(
        self, name: str, base_layer: nn.Module, context: Context, selector: Selector, sizes: LayerSizes
    ) -> None:
        super().__init__(name, base_layer, context, sizes)
        self.set_selector(selector)
        heads, k, n = sizes.n_heads, self.in_features, self.out_features
        if heads < 1 or k % heads or n % heads:
            raise ValueError(
                f"layer '{name}': n_heads = {heads} does not divide its {k} inputs and {n} outputs; choose a common "
                "divisor, or leave the layer out of target_modules"
            )
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.factor_dtype}
        self.lora_A: nn.Parameter | None = nn.Parameter(
            torch.empty(heads, sizes.n_skills, k // heads, sizes.rank, **like).uniform_(-(k**-0.5), k**-0.5)
        )
        self.lora_B = nn.Parameter(torch.zeros(heads, sizes.n_skills, sizes.rank, n // heads, **like))
        self.A0: Tensor | None
        self.B0: Tensor | None
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)

    def set_selector(self, selector: Selector) -> None:
        """Route by a selector, which is a submodule of the model, not of the layers that read it."""
        object.__setattr__(self, "selector", selector.to(self.weight.device, self.factor_dtype))

    @property
    def state(self) -> State:
        if self.A0 is None:
            return "plain"
        return "short" if self.B0 is None else "pair"

    def adapted(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        p = self.sizes.dropout if self.training else 0.0
        if self.stream is not None:
            return self._both_streams(x, routing, weight, bias, p)
        layer = (x, weight, bias)
        factors = routing.factors.get(self.layer_name)
        if factors is not None:
            groups = routing.groups(self._lead(x, routing.places), x.device)
            return grouped_lora_linear(
                *layer, *factors, groups, self.sizes.scaling, A0=self.A0, B0=self.B0, dropout_p=p
            )
        weights = routing.weights.get(self.layer_name)
        if weights is None:
            gated = self.selector.weights(x)  # of a wrong shape are refused by the op
            assert isinstance(gated, Tensor)  # only weights of no task come in pairs
            weights = gated
        else:
            copies = self._lead(x, weights[..., 0, 0])[0] // max(weights.shape[0], 1)
            weights = weights.to(x.device).repeat_interleave(copies, 0)
        return routed_lora_linear(
            *layer, self.lora_A, self.lora_B, weights, self.sizes.scaling, A0=self.A0, B0=self.B0, dropout_p=p
        )  # fmt: skip

    @torch.compiler.disable
    def _both_streams(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None, p: float) -> Tensor:
        if not torch.is_grad_enabled():
            refuse_inside_function(f"layer '{self.layer_name}'")
        assert self.stream is not None
        assert self.A0 is not None
        x, x_tangent = self.stream.enter(x)
        factors = unrecorded(routing.factors[self.layer_name])
        groups = routing.groups(self._lead(x, routing.places), x.device)
        layer = x, weight, bias, self.A0, self.B0, *factors, groups, self.sizes.scaling, x_tangent
        return self.stream.leave(*dual.grouped_lora_linear(GroupedLoraLinear(*layer, p)))

    def _lead(self, x: Tensor, places: Tensor) -> tuple[int, ...]:
        """The leading dimensions of x, the first of which holds the examples (or copies of each in succession)."""
        lead = tuple(x.shape[:-1])
        examples = places.shape[0]
        if places.dim() == 2:
            fits = lead[:2] == tuple(places.shape)
        else:
            fits = len(lead) > 0 and (lead[0] % examples == 0 if examples else lead[0] == 0)
            if examples > 1 and len(lead) > 1 and lead[0] != examples and 0 < x.stride(0) < x.stride(1):
                fits = lead[1] == 1  # not a view (length, examples, K) of (examples, length, K), as Longformer takes
        if not fits:
            raise ValueError(
                f"layer '{self.layer_name}': the routing is of {tuple(places.shape)} "
                f"{'examples' if places.dim() == 1 else 'tokens'}, which an input {tuple(x.shape)} does not consist of "
                "along its first dimension; leave the layer out of target_modules"
            )
        return lead

    def linearize(self) -> None:
        """Linearize the layer at the mean of its inventory, in place: A and B become the offsets from it."""
        if self.state != "plain":
            raise ValueError(f"layer '{self.layer_name}' is linearized already; call linlora.delinearize first")
        assert self.lora_A is not None
        around = center(self.lora_A.detach(), self.lora_B.detach())
        if self.lora_B.detach().any():
            self.A0, self.B0 = around.A0, around.B0
            self.lora_A.data.copy_(around.A)
            self.lora_B.data.copy_(around.B)
        else:
            self.A0, self.lora_A = around.A0, None

    def allocate_point(self, state: State) -> None:
        """Linearize at a point of zeros; a caller fills in point and offsets."""
        self.A0 = self.lora_B.new_zeros(self.sizes.rank, self.in_features)
        if state == "short":
            self.lora_A = None
        else:
            self.B0 = self.lora_B.new_zeros(self.out_features, self.sizes.rank)

    def delinearize(self) -> None:
        """Make the layer plain again, in place, with the skills (A0 + A, B0 + B)."""
        if self.A0 is None:
            return
        B0 = self.lora_B.new_zeros(self.out_features, self.sizes.rank) if self.B0 is None else self.B0
        skill_A, skill_B = skill(self.A0, B0, self.sizes.n_heads)
        if self.lora_A is None:
            every_skill = skill_A.repeat(1, self.sizes.n_skills, 1, 1)
            self.lora_A = nn.Parameter(every_skill, requires_grad=self.lora_B.requires_grad)
        else:
            self.lora_A.data.add_(skill_A)
        self.lora_B.data.add_(skill_B)
        self.A0 = self.B0 = None

    def skills(self) -> Iterator[nn.Parameter]:
        """The parameters of the inventory."""
        yield from (p for p in (self.lora_A, self.lora_B) if p is not None)

    @torch.no_grad()
    def mixed(self, weights: Tensor) -> tuple[Tensor | None, Tensor]:
        """One mixture (Q, S) of the skills (linearized, of their offsets) in PEFT's layout, (r, K) and (N, r)."""
        (A_z,), (B_z,) = mix_inventories([self.lora_A], [self.lora_B], [weights.unsqueeze(0).to(self.lora_B)])
        return None if A_z is None else A_z[0].t().contiguous(), B_z[0].t().contiguous()

    def adapter(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The exact LoRA factors of the layer with one mixture (Q, S) for all rows: (r, K), (N, r), or of rank 2r."""
        A_z, B_z = self.mixed(weights)
        if self.B0 is not None:
            assert self.A0 is not None
            assert A_z is not None
            return torch.cat([self.A0, A_z]), torch.cat([self.B0 + B_z, self.B0], dim=1)
        A = A_z if self.A0 is None else self.A0
        assert A is not None
        return A, B_z

    def extra_repr(self) -> str:
        sizes = self.sizes
        return f"{self.state}, rank {sizes.rank}, {in_words(sizes.n_skills, sizes.n_heads)}, scaling {sizes.scaling:g}"
