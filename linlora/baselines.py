"""What linlora is compared with and tested against: the same linearization through `torch.func.jvp`.

This is how linearized adapters are trained without linlora (the code released with arXiv 2310.04742 does it over all
parameters of a layer): keep a frozen copy of the parameters, subtract it, push the difference through forward-mode AD.
"""

from __future__ import annotations

from typing import Literal

import peft
import torch
from torch import Tensor, nn

Over = Literal["all", "adapter"]


class FunctorchLoraLinear(nn.Module):
    """A PEFT LoRA layer linearized by `torch.func.jvp`.

    Over "all" parameters, the base weight and bias are primals too and are stored twice, as in the released code;
    over the "adapter" only A and B are, the strongest form of this baseline.
    """

    def __init__(self, layer: peft.tuners.lora.Linear, over: Over = "all") -> None:
        super().__init__()
        self.layer = layer
        self.over = over
        parameters = dict(layer.named_parameters())
        self.names = [name for name in parameters if over == "all" or "lora_" in name]
        for i, name in enumerate(self.names):
            self.register_buffer(f"point_{i}", parameters[name].detach().clone())

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which some models ask their layers for."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        parameters = dict(self.layer.named_parameters())
        point = {name: getattr(self, f"point_{i}") for i, name in enumerate(self.names)}
        delta = {name: parameters[name] - point[name] for name in self.names}

        def layer(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.layer, parameters, (x,))

        y, y_tangent = torch.func.jvp(layer, (point,), (delta,))[:2]
        return y + y_tangent


def linearize_with_functorch(model: nn.Module, over: Over = "all") -> nn.Module:
    """Wrap every LoRA layer of a PEFT model in a FunctorchLoraLinear, in place, at its current values.

    >>> from linlora import baselines, testing
    >>> model = baselines.linearize_with_functorch(testing.tiny_model("bert"))
    >>> model(**testing.tiny_batch("bert")).logits.shape
    torch.Size([3, 3])
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, peft.tuners.lora.Linear) and not isinstance(parent, FunctorchLoraLinear):
                setattr(parent, name, FunctorchLoraLinear(child, over))
    return model
