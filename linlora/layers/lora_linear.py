"""The layer: a PEFT LoRA linear layer whose forward is one linlora op.

`ConvertedLoraLinear` *is* a `peft.tuners.lora.Linear`: a layer becomes one by a change of its class, so no parameter is
moved, renamed or copied, and adapters are switched, saved and merged by PEFT's own code. `linlora.layers.adapters` says
what is passed to the op for each of them.

The op reads the weights of the layer's parts. Where PEFT's calls of the parts do more (linlora.layers.calls), the base
layer is called and the update added, or all parts are called (linlora.layers.called), both with a warning.

At layer scope the layer returns primal + tangent. At model scope, where it has a `stream`, it returns both as a
DualTensor (linlora.stream).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn

from linlora.kernels import problem
from linlora.kernels.problem import Factors
from linlora.layers.adapters import check_input
from linlora.layers.called import called_update
from linlora.layers.calls import PATCHED, beyond_product, is_product, pefts_forward_is_its_own
from linlora.layers.layer_merging import MergeableAdapters
from linlora.layers.mixed_batches import mixed_batch
from linlora.layers.mixtures import Rows
from linlora.ops import dual
from linlora.ops.checks import autocast_input
from linlora.ops.lora_linear import run
from linlora.ops.low_rank_update import dual_low_rank_update, low_rank_update
from linlora.stream import DualTensor
from linlora.stream.evaluation import recording, unrecorded
from linlora.stream.tensor import refuse_inside_function

DROPS_ALL = "the dropout of its parts is 1"


class ConvertedLoraLinear(MergeableAdapters):
    """A PEFT LoRA linear layer, plain or linearized, computed by one op. Made by `linlora.layers.conversion`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters or self.merged_adapters or args or kwargs:
            return self._base_forward(x, *args, **kwargs)
        if self.mixed:
            self._end_of_mixed()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return self.base_layer(x)
        if self.stream is not None:
            return self._both_streams(x, active)
        if (why := self.why_called(active)) is not None:
            return self._called(x, active, why)
        factors = self.factors(active[0]) if len(active) == 1 else self._stacked(active)
        p = self._dropout_p(active)
        if p == 1.0:
            return self._called(x, active, DROPS_ALL)
        return self._one_stream(x, factors, p)

    def _called(self, x: Tensor, adapters: Sequence[str], why: str) -> Tensor:
        """Every part called: by PEFT's own forward, and where an adapter is linearized by `called_update`."""
        self.warn_of_calls(why)
        if all(self.states[name] == "plain" for name in adapters):
            return super().forward(x)
        self._refuse_patched(adapters)
        y = self.base_layer(x)
        return y + torch.add(*called_update(self, adapters, x)).to(y.dtype)

    def _one_stream(self, x: Tensor, factors: Factors, p: float) -> Tensor:
        """Layer scope, and plain LoRA: primal + tangent."""
        if not is_product(self.base_layer):
            self._warn_of_base()
            return low_rank_update(self.base_layer(x), autocast_input(x), factors, p)
        weight = self.matrix
        x = autocast_input(x)
        if x.shape[-1] != weight.shape[1] or x.device != weight.device or x.dtype != weight.dtype:
            check_input(self.layer_name, x, weight)
        layer = problem.LoraLinear(x, weight, self.base_layer.bias, *factors, None, p)
        if torch._C._get_tracing_state() is None:
            return run(layer)
        with torch.enable_grad():  # torch.jit.trace compares two graphs, one of them made without gradients
            return run(layer)

    @torch.compiler.disable
    def _both_streams(self, x: Tensor, active: list[str]) -> Tensor:
        """Model scope: the primal at (A0, B0) and the tangent in (dA, dB) and in the stream so far."""
        if not torch.is_grad_enabled():
            refuse_inside_function(f"layer '{self.layer_name}'")
        if torch.jit.is_tracing():
            raise ValueError(
                f"layer '{self.layer_name}': torch.jit.trace does not see the tangent of a model linearized at model "
                "scope; trace the layer-scope function (linlora.set_scope(model, 'layer')), or linlora.delinearize"
            )
        if plain := [name for name in active if self.states[name] == "plain"]:
            raise ValueError(
                f"layer '{self.layer_name}': adapter {plain} is not linearized, the model is (model scope); activate a "
                "linearized adapter, or delinearize the model and linearize it again with all its adapters"
            )
        assert self.stream is not None
        x, x_tangent = self.stream.enter(x)
        if recording() and any(parameter.requires_grad for parameter in self.base_layer.parameters()):
            raise ValueError(
                f"layer '{self.layer_name}': its base weight asks for a gradient, but model scope linearizes in the "
                "adapter alone; freeze it with requires_grad_(False)"
            )
        factors = unrecorded(self.factors(active[0]) if len(active) == 1 else self._stacked(active))
        p = self._dropout_p(active)
        if (why := self.why_called(active) or (DROPS_ALL if p == 1.0 else None)) is not None:
            return self.stream.leave(*self._called_streams(x, x_tangent, active, why))
        return self.stream.leave(*self._two_streams(x, x_tangent, factors, p))

    def _called_streams(
        self, x: Tensor, x_tangent: Tensor | None, adapters: list[str], why: str
    ) -> tuple[Tensor, Tensor]:
        self._refuse_patched(adapters)
        self.warn_of_calls(why)
        y, y_tangent = self._base_streams(x, x_tangent)
        update, tangent = (of.to(y.dtype) for of in called_update(self, adapters, x, x_tangent, two=True))
        return y + update, tangent if y_tangent is None else y_tangent + tangent

    def _base_streams(self, x: Tensor, x_tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The base layer called, on both streams."""
        assert self.stream is not None
        y = self.base_layer(x if x_tangent is None else DualTensor(x, x_tangent, self.stream))
        return (y.primal, y.tangent) if isinstance(y, DualTensor) else (y, None)

    def _two_streams(self, x: Tensor, x_tangent: Tensor | None, factors: Factors, p: float) -> tuple[Tensor, Tensor]:
        if is_product(self.base_layer):
            check_input(self.layer_name, autocast_input(x), self.matrix)
            layer = (self.matrix, self.base_layer.bias, *factors)
            return dual.lora_linear(problem.LoraLinear(x, *layer, x_tangent, p, None, two_streams=True))
        self._warn_of_base()
        y, y_tangent = self._base_streams(x, x_tangent)
        x_tangent = None if x_tangent is None else autocast_input(x_tangent)
        return dual_low_rank_update((y, y_tangent), (autocast_input(x), x_tangent), factors, p)

    def _warn_of_base(self) -> None:
        """Warn where a call of the base layer is more than the product with its weight."""
        warnings.warn(
            f"layer '{self.layer_name}': its base layer {beyond_product(self.base_layer)}, so it is called and the "
            "update added: two steps, not one op",
            stacklevel=3,
        )

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Answer calls with `adapter_names`; leave disabled and merged adapters to PEFT's own forward."""
        if kwargs.get("adapter_names") is not None:
            kwargs["adapter_names"] = Rows.of(kwargs["adapter_names"])
        rows = kwargs.get("adapter_names")
        if self._disable_adapters or (self.merged_adapters and rows is None):
            return super().forward(x, *args, **kwargs)
        if rows is None or args or len(kwargs) > 1:
            raise ValueError(f"layer '{self.layer_name}': unexpected arguments {args or list(kwargs)} beside the input")
        PeftLoraLinear._check_forward_args(self, x, **kwargs)
        if not pefts_forward_is_its_own():
            raise ValueError(f"layer '{self.layer_name}': {PATCHED}, which is not run with adapter_names")
        return self._by_rows(x, rows)

    def _by_rows(self, x: Tensor, rows: Rows) -> Tensor:
        """The layer with a mixture of adapters for every row."""
        return mixed_batch(self, x, rows)

    def _end_of_mixed(self) -> None:
        """Note a call without `adapter_names` after one with them.

        In backward such a call is a recomputation that lost its names: the active adapter would get the gradients of
        rows that are not its own.
        """
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"layer '{self.layer_name}': the layer is recomputed in backward without the adapter_names it ran "
                "with. Checkpoint with model.gradient_checkpointing_enable(), which keeps them, not with "
                "torch.utils.checkpoint"
            )
        self.mixed = False


def converted_layers(model: nn.Module) -> Iterator[tuple[str, ConvertedLoraLinear]]:
    """Every converted layer of a model with the name it has in the base model."""
    for module in model.modules():
        if isinstance(module, ConvertedLoraLinear):
            yield module.layer_name, module
