"""What the ops ask of their arguments, stated once."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype autocast computes linear layers in, where autocast is on; the ops cast the rest to x's dtype."""
    device = x.device.type
    if autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; False for those it does not exist on ("meta")."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
