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


def check_number(op: str, name: str, value: float | Tensor) -> None:
    """Raise a ValueError for a number that asks for a gradient, which no op gives."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        _refuse(op, f"{name} asks for a gradient, which this op does not give; pass a number, and scale an input by it")


def check_dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    if not 0.0 <= dropout_p < 1.0:
        _refuse(op, f"dropout_p is {dropout_p}: a probability below 1 is expected")
    if dropout_p > 0.0 and seed is None:
        _refuse(op, "dropout needs a seed: pass seed=torch.randint(2**31, (), device=x.device)")


def _refuse(op: str, message: str) -> None:
    raise ValueError(f"{op}: {message}")
