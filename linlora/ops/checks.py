"""What the ops ask of their arguments, stated once."""

from __future__ import annotations

import torch
from torch import Tensor

from linlora.kernels.problem import autocast_enabled


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype autocast computes linear layers in, where autocast is on; the ops cast the rest to x's dtype."""
    if autocast_enabled(x) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
