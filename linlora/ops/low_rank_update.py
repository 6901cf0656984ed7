"""The low-rank part of a LoRA layer, added to what its base layer returns: a quantized one, or one with hooks.

    y + s [ u dBᵀ + c B0ᵀ ]        u = x' A0ᵀ    c = x' (A0 + dA)ᵀ

Two products, whatever the number of factors: x' with [A0; A0 + dA], and that with [dB, B0]. Composed of differentiable
aten calls; W, and what became of it, is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.reference import dropout


def low_rank_update(
    y: Tensor,
    x: Tensor,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y + s [(x' A0ᵀ)(B0 + dB)ᵀ + (x' dAᵀ) B0ᵀ], (..., N), in y's dtype; computed in x's.

    Arguments as of `linearized_lora_linear`; y (..., N) is the output of the base layer.

    >>> x, A0, dB = torch.ones(2, 3), torch.ones(1, 3), torch.ones(3, 1)
    >>> low_rank_update(torch.zeros(2, 3), x, A0, None, None, dB, 0.5)[0].tolist()
    [1.5, 1.5, 1.5]
    """
    shrink, expand = A0.to(x.dtype), dB.to(x.dtype)
    if B0 is not None and dA is not None:
        shrink = torch.cat([shrink, shrink + dA.to(x.dtype)])
        expand = torch.cat([expand, B0.to(x.dtype)], dim=1)
    low = linear(dropout(x, dropout_p, seed), shrink)
    return torch.add(y, linear(low, expand).to(y.dtype), alpha=scaling)
