"""The low-rank part of a LoRA layer, added to what its base layer returns: a quantized one, or one with hooks.

    one stream     y    + s [ c B0ᵀ + u dBᵀ ]        u = x' A0ᵀ    c = x' (A0 + dA)ᵀ
    two streams    y    + s u B0ᵀ                    u = x' A0ᵀ    c = x' dAᵀ + x_t' A0ᵀ
                   y_t  + s [ c B0ᵀ + u dBᵀ ]

Composed of differentiable aten calls; W, and what became of it, is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from linlora.kernels.problem import Factors
from linlora.ops import aten

Streams = tuple[Tensor, Tensor | None]


def low_rank_update(y: Tensor, x: Tensor, factors: Factors, dropout_p: float = 0.0) -> Tensor:
    """y + s [(x' A0ᵀ)(B0 + dB)ᵀ + (x' dAᵀ) B0ᵀ], (..., N), in y's dtype; computed in x's.

    y (..., N) is the output of the base layer for x (..., K). Two products, whatever the number of factors: x' with
    [A0; A0 + dA], and that with [dB, B0].

    >>> x, A0, dB = torch.ones(2, 3), torch.ones(1, 3), torch.ones(3, 1)
    >>> low_rank_update(torch.zeros(2, 3), x, Factors(A0, None, None, dB, 0.5))[0].tolist()
    [1.5, 1.5, 1.5]
    """
    A0, B0, dA, dB = _cast(factors, x.dtype)
    if B0 is not None and dA is not None:
        A0, dB = torch.cat([A0, A0 + dA]), torch.cat([dB, B0], dim=1)
    low = linear(aten.dropout(x, dropout_p, None), A0)
    return torch.add(y, linear(low, dB).to(y.dtype), alpha=factors.scaling)


def dual_low_rank_update(y: Streams, x: Streams, factors: Factors, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """The (y, y_tangent) of a layer at model scope, both (..., N), from those of its base; a tangent None is zero.

    The primal is a function of (A0 + dA, B0 + dB) at dA = dB = 0, so it is computed with factors whose values are A0
    and B0 and whose gradients are those of dA and dB. The tangent is a constant to autograd.
    """
    (primal, tangent), (x_primal, x_tangent) = y, x
    A0, B0, dA, dB = _cast(factors, x_primal.dtype)
    A = A0 if B0 is None or dA is None else A0 + _at_zero(dA)
    B = _at_zero(dB) if B0 is None else B0 + _at_zero(dB)
    mask = aten.mask(x_primal, dropout_p, None) if dropout_p > 0.0 else None
    low = aten.dropout(x_primal, dropout_p, mask)
    primal = torch.add(primal, linear(linear(low, A), B).to(primal.dtype), alpha=factors.scaling)
    with torch.no_grad():
        change = linear(linear(low, A0), dB)
        if B0 is not None and dA is not None:
            c = linear(low, dA)
            if x_tangent is not None:
                c = c + linear(aten.dropout(x_tangent, dropout_p, mask), A0)
            change = change + linear(c, B0)
        change = factors.scaling * change.to(primal.dtype)
        return primal, change if tangent is None else tangent + change


def _cast(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    A0, B0, dA, dB = (None if factor is None else factor.to(dtype) for factor in factors[:4])
    assert A0 is not None
    assert dB is not None
    return A0, B0, dA, dB


def _at_zero(delta: Tensor) -> Tensor:
    """0, with the gradient of `delta`."""
    return delta - delta.detach()
