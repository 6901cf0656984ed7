"""Linearizes the LoRA parts of a layer by calling them, as PEFT does, so that their hooks count too.

The low-rank branch is g(x, A, B) = lora_B(lora_A(lora_dropout(x))), with everything a call of these runs. Forward mode
gives its value and its derivative along (dA, dB), and x_t, in one call of each part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from linlora.layers.adapters import LoraAdapters
from linlora.layers.sharding import check_weight


@torch.compiler.disable
def called_update(
    layer: LoraAdapters, adapters: Sequence[str], x: Tensor, x_tangent: Tensor | None = None, two: bool = False
) -> tuple[Tensor, Tensor]:
    """Σ s g and Σ s dg of some adapters, those that are plain with dg = 0.

    With `two`, for model scope, the gradient with respect to (dA, dB) is the primal's, and the tangent is a constant.

    Raises ValueError where the weight of a part is no parameter, or not there.
    """
    if torch.is_inference_mode_enabled():  # in which there is no forward mode
        with torch.inference_mode(False), torch.no_grad():
            x, x_tangent = x.clone(), None if x_tangent is None else x_tangent.clone()
            return called_update(layer, adapters, x, x_tangent, two)
    primals, tangents = [], []
    for name in adapters:
        A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        for kind, part in (("lora_A", A), ("lora_B", B)):
            check_weight(f"layer '{layer.layer_name}'", f"{kind}['{name}'], a linearized adapter,", part)
        dB: Tensor | None
        A0, B0, dA, dB, scaling = layer.factors(name)
        if layer.states[name] == "plain":
            dA, B0, dB = None, dB, None
        with forward_ad.dual_level():
            z = layer._cast_input_dtype(_dual(x, x_tangent), A.weight.dtype)
            z = functional_call(A, {"weight": _along(A0, dA, two)}, (dropout(z),))
            B0 = torch.zeros_like(B.weight) if B0 is None else B0
            primal, tangent = forward_ad.unpack_dual(functional_call(B, {"weight": _along(B0, dB, two)}, (z,)))
        primals.append(scaling * primal)
        tangents.append(torch.zeros_like(primal) if tangent is None else scaling * tangent)
    tangent = sum(tangents[1:], tangents[0])
    return sum(primals[1:], primals[0]), tangent.detach() if two else tangent


def called_plain_update(layer: LoraAdapters, adapter: str, x: Tensor) -> Tensor:
    """The update of an adapter that is not linearized: s lora_B(lora_A(lora_dropout(x))), as PEFT calls it."""
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    x = layer._cast_input_dtype(x, A.weight.dtype)
    return layer.scaling[adapter] * B(A(layer.lora_dropout[adapter](x)))


def _along(factor: Tensor, delta: Tensor | None, two: bool) -> Tensor:
    if delta is None:
        return factor
    return _dual(factor + (delta - delta.detach()), delta.detach()) if two else _dual(factor, delta)


def _dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    return primal if tangent is None else forward_ad.make_dual(primal, tangent.to(primal.dtype))
