"""The rows of an activation: what the ops, which are ops on matrices, make of its leading dimensions."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x (..., K) as a matrix (M, K), also where K or M is 0 and `reshape(-1, K)` could not tell the other.

    >>> import torch
    >>> as_rows(torch.ones(2, 3, 0)).shape, as_rows(torch.ones(4)).shape
    (torch.Size([6, 0]), torch.Size([1, 4]))
    """
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def of_rows(y: Tensor, x: Tensor) -> Tensor:
    """The rows y (M, N) of x (..., K) as (..., N)."""
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])
