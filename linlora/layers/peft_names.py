"""Names of PEFT: those of modules in the base model, and those by which its optimizers find parameters.

LoRA+ gives a higher learning rate to parameters with 'lora_B' in their names, LoRA-FA takes those with 'lora_' in
pairs of A and B. The change dB of an adapter that started at B0 != 0 is for LoRA+ what B is, so it lies in a module of
such a name: `<layer>.of_lora_B.lora_dB.<adapter>`. LoRA-FA has no pair to take there, and is refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

DELTAS = ("lora_dA", "of_lora_B.lora_dB")
"""The places of dA and dB in a layer."""


def base_name(name: str) -> str:
    """The name that a module of a PeftModel has in the base model."""
    return name.removeprefix("base_model.model.")


class ChangesOfB(nn.Module):
    """Holds `lora_dB` of a layer, the ParameterDict of dB by adapter."""

    def __init__(self, layer_name: str) -> None:
        super().__init__()
        self.layer_name = layer_name
        self.lora_dB = nn.ParameterDict()

    def __getattr__(self, name: str) -> Any:
        """`create_lorafa_optimizer` asks the module that holds a parameter with 'lora_' in its name for its scaling."""
        if name == "scaling":  # not a property, of which torch.jit.trace asks for all
            raise ValueError(
                f"layer '{self.layer_name}': LoRA-FA trains B of pairs (A, B), and an adapter linearized at B0 != 0 "
                "trains dA and dB. Use another optimizer, freezing lora_dA for the function LoRA-FA trains, or "
                "linearize at B0 = 0, where A is frozen and LoRA-FA applies"
            )
        return super().__getattr__(name)
