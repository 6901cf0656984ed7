"""LoRA over a quantized base layer: the base runs unchanged, and the low-rank part is added to its output.

One op for W and both factors needs W. Over a quantized base the layer is two steps: the quantized forward and one
low-rank update at layer scope; base(x), base(x_t) and an update of both streams at model scope. The base is never
dequantized: an adapter over it is served unmerged.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from linlora.kernels.problem import Factors
from linlora.layers.calls import is_called_plainly
from linlora.layers.lora_linear import ConvertedLoraLinear
from linlora.layers.mixed_batches import begin_mixed, called_by_rows
from linlora.layers.mixtures import Rows
from linlora.layers.weights import Update
from linlora.ops.checks import autocast_input
from linlora.ops.low_rank_update import dual_low_rank_update, low_rank_update
from linlora.stream.modules import linear_part

_CLASSES = {
    "peft.tuners.lora.bnb": ("Linear8bitLt", "Linear4bit"),
    "peft.tuners.lora.torchao": ("TorchaoLoraLinear",),
}


def quantized(layer: Any) -> bool:
    """Whether a PEFT LoRA layer is one over a base layer quantized by bitsandbytes or torchao."""
    return isinstance(layer, QuantizedLoraLinear) or type(layer).__name__ in _CLASSES.get(type(layer).__module__, ())


class QuantizedLoraLinear(ConvertedLoraLinear):
    """A LoRA layer over a quantized base, plain or linearized. Made by `linlora.layers.conversion`."""

    fan_in_fan_out = False
    peft_class: type

    @property
    def kind(self) -> str:
        """The kind of the quantized base, by the name of its library's class."""
        base = self.base_layer
        return (
            type(base).__name__
            if not isinstance(base, nn.Linear) or type(base).__module__.startswith("bitsandbytes.")
            else type(base.weight).__name__
        )

    def _one_stream(self, x: Tensor, factors: Factors, p: float) -> Tensor:
        return low_rank_update(self.base_layer(x), autocast_input(x), factors, p)

    def _two_streams(self, x: Tensor, x_tangent: Tensor | None, factors: Factors, p: float) -> tuple[Tensor, Tensor]:
        y = self.base_layer(x)
        y_tangent = None
        if x_tangent is not None:
            if not is_called_plainly(self.base_layer):
                raise ValueError(
                    f"layer '{self.layer_name}': its quantized base layer has hooks or a forward of its own, which "
                    "both streams would run through as if it were linear; remove it, or use scope='layer'"
                )
            y_tangent, x_tangent = linear_part(self.base_layer, x_tangent), autocast_input(x_tangent)
        return dual_low_rank_update((y, y_tangent), (autocast_input(x), x_tangent), factors, p)

    def _by_rows(self, x: Tensor, rows: Rows) -> Tensor:
        begin_mixed(self, rows)
        return called_by_rows(self, x, rows)

    def _update(self, adapters: list[str]) -> Update:
        if self.stream is not None:
            raise ValueError(self._no_weight())
        raise ValueError(
            f"layer '{self.layer_name}': the base is quantized ({self.kind}), and ΔW would be lost in its rounding. "
            "Serve base and adapter unmerged, or merge into the original weights (linlora merge BASE ADAPTER --out "
            "MERGED) and quantize the result"
        )
