"""`low_rank_update` of model scope: both streams, and the gradient of the whole network's linearization.

    y    + s u B0ᵀ                    u = x' A0ᵀ
    y_t  + s [ c B0ᵀ + u dBᵀ ]        c = x' dAᵀ + x_t' A0ᵀ

The primal is a function of (A0 + dA, B0 + dB) at dA = dB = 0, so it is computed with factors whose values are A0 and B0
and whose gradients are those of dA and dB. The tangent is a constant to autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.reference import dropout


def low_rank_update(
    y: Tensor,
    y_tangent: Tensor | None,
    x: Tensor,
    x_tangent: Tensor | None,
    A0: Tensor,
    B0: Tensor | None,
    dA: Tensor | None,
    dB: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, y_tangent) of the layer, both (..., N), from those of its base; a tangent that is None is zero."""
    A = A0 if B0 is None or dA is None else A0 + _at_zero(dA)
    B = _at_zero(dB) if B0 is None else B0 + _at_zero(dB)
    low = dropout(x, dropout_p, seed)
    primal = torch.add(y, linear(linear(low, A.to(x.dtype)), B.to(x.dtype)).to(y.dtype), alpha=scaling)
    with torch.no_grad():
        change = linear(linear(low, A0.to(x.dtype)), dB.to(x.dtype))
        if B0 is not None and dA is not None:
            c = linear(low, dA.to(x.dtype))
            if x_tangent is not None:
                c = c + linear(dropout(x_tangent, dropout_p, seed), A0.to(x.dtype))
            change = change + linear(c, B0.to(x.dtype))
        tangent = scaling * change.to(y.dtype)
        return primal, tangent if y_tangent is None else y_tangent + tangent


def _at_zero(delta: Tensor) -> Tensor:
    """0, with the gradient of `delta`."""
    return delta - delta.detach()
