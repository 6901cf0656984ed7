"""The same linearization through `torch.func.jvp`, to compare with and to test against.

This is how linearized adapters are trained without linlora (the code released with arXiv 2310.04742 does it over all
parameters of a layer): keep a frozen copy of the parameters, subtract it, push the difference through forward-mode AD.
"""

from __future__ import annotations

from typing import Any, Literal

import peft
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        self.names = _keep_point(self, layer, over)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which some models ask their layers for."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        def layer(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.layer, parameters, (x,))

        y, y_tangent = torch.func.jvp(layer, *self.point_and_delta())[:2]
        return y + y_tangent

    def point_and_delta(self) -> tuple[tuple[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        """Primals and tangents of the parameters, as `torch.func.jvp` takes them."""
        return _point_and_delta(self, self.layer, self.names)


class FunctorchModel(nn.Module):
    """A PEFT model linearized as a whole in its adapter by `torch.func.jvp`, at the adapter's current values.

    F = f(φ0) + J δ with J the Jacobian of the whole network in A and B, which train: what
    `linlora.linearize(model, scope="model")` computes, by reverse mode over forward mode. Attention runs under
    SDPBackend.MATH, the only one with forward-mode AD, so scores of length × length stay in memory for backward.

    Takes the model's inputs without labels and returns F of its output, where that is a tensor, or of the first of its
    outputs (the logits); a loss is taken on that.

    >>> from linlora import baselines, testing
    >>> model = baselines.FunctorchModel(testing.tiny_model("bert"))
    >>> model(**testing.tiny_batch("bert")).shape
    torch.Size([3, 3])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = _keep_point(self, model, "adapter")

    def forward(self, **inputs: Any) -> Tensor:
        if inputs.get("labels") is not None:
            raise ValueError("FunctorchModel would linearize the loss too: leave the labels out, take the loss outside")

        def network(parameters: dict[str, Tensor]) -> Tensor:
            output = torch.func.functional_call(self.model, parameters, (), inputs)
            return output if isinstance(output, Tensor) else output[0]

        with sdpa_kernel(SDPBackend.MATH):
            y, y_tangent = torch.func.jvp(network, *_point_and_delta(self, self.model, self.names))[:2]
        return y + y_tangent


def _keep_point(holder: nn.Module, module: nn.Module, over: Over) -> list[str]:
    """Give `holder` copies of the parameters of `module` that are linearized, and return their names."""
    parameters = dict(module.named_parameters())
    names = [name for name in parameters if over == "all" or "lora_" in name]
    for i, name in enumerate(names):
        holder.register_buffer(f"point_{i}", parameters[name].detach().clone())
    return names


def _point_and_delta(
    holder: nn.Module, module: nn.Module, names: list[str]
) -> tuple[tuple[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
    parameters = dict(module.named_parameters())
    point = {name: getattr(holder, f"point_{i}") for i, name in enumerate(names)}
    return (point,), ({name: parameters[name] - point[name] for name in names},)


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
