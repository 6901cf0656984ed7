"""The problem of a norm of rows on two streams, in the manner of `problem`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import Output


class NormResult(NamedTuple):
    """Both streams, and the numbers of each row that backward wants; None for what there is not."""

    y: Any  # (M, N)
    y_tangent: Any  # (M, N), with an x_tangent
    mean: Any  # (M,), of the layer norm
    rstd: Any  # (M,)


class Norm(NamedTuple):
    """Layer norm, or RMS norm where it is not centered::

        layer norm   x̂ = (x − mean(x)) rstd    rstd = (var(x) + eps)^-½      y = w ⊙ x̂ + b    y_t = w ⊙ J x_t
        RMS norm     x̂ = x rstd                rstd = (mean(x²) + eps)^-½    dx = J (w ⊙ g)

    J is the Jacobian of x̂ in x, a symmetric matrix. w and b are frozen.
    """

    x: Tensor  # (M, N)
    x_tangent: Tensor | None  # like x
    weight: Tensor | None  # (N,)
    bias: Tensor | None  # (N,), of the layer norm
    eps: float
    centered: bool

    @property
    def op(self) -> str:
        """The public name of the op."""
        return "layer_norm" if self.centered else "rms_norm"

    def outputs(self) -> NormResult:
        """What the kernels return."""
        y, number = Output(tuple(self.x.shape), self.x.dtype), Output((self.x.shape[0],), torch.float32)
        return NormResult(y, None if self.x_tangent is None else y, number if self.centered else None, number)
