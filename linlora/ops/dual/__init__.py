"""The ops of model scope: both streams forward, the backward of the primal alone.

A network linearized at φ0 is F(δ) = f(φ0) + J δ, and ∂L/∂δ = Jᵀ ∂L/∂F is the ordinary backward of the primal at φ0,
whatever δ is. So each op here takes (primal, tangent), returns (primal, tangent), and gives gradients through the
primal only: its tangent is a constant to autograd, nothing is saved for it, and cotangents never reach it. Tangents
that ask for a gradient, and transforms around an op, are refused (`checks`); the ops of `linlora.functional` serve
both. A tangent that is None is zero and costs nothing. One file an op, one backend call in each direction.
"""

from linlora.ops.dual.activations import activation, gated_activation
from linlora.ops.dual.attention import attention
from linlora.ops.dual.grouped_lora_linear import grouped_lora_linear
from linlora.ops.dual.linear import linear
from linlora.ops.dual.lora_linear import lora_linear
from linlora.ops.dual.norms import layer_norm, rms_norm

__all__ = [
    "activation",
    "attention",
    "gated_activation",
    "grouped_lora_linear",
    "layer_norm",
    "linear",
    "lora_linear",
    "rms_norm",
]
