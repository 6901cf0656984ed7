"""Inventories of S skills in Q heads, A (Q, S, K/Q, r) and B (Q, S, r, N/Q): average, center, and one skill of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from linlora.ops.routing_checks import check_inventory


class Centered(NamedTuple):
    """An inventory as a linearization point A0 (r, K), B0 (N, r) and the skills' offsets from it."""

    A0: Tensor
    B0: Tensor
    A: Tensor
    B: Tensor


def average(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The average skill as one LoRA adapter (r, K), (N, r): uniform routing, collapsed (MHR-μ).

    Raises ValueError where A and B do not fit each other.

    >>> import torch
    >>> A, B = average(torch.randn(4, 8, 16, 2), torch.randn(4, 8, 2, 24))
    >>> A.shape, B.shape
    (torch.Size([2, 64]), torch.Size([96, 2]))
    """
    if A.dim() == B.dim() == 4:
        check_inventory(A, B, (A.shape[0] * A.shape[2], B.shape[0] * B.shape[3]))
    else:
        check_inventory(A, B, (0, 0))
    return A.mean(1).flatten(0, 1).t().contiguous(), B.mean(1).transpose(0, 1).flatten(1).t().contiguous()


def center(A: Tensor, B: Tensor, point: tuple[Tensor, Tensor] | None = None) -> Centered:
    """The inventory around its average, or around a given point (A0 (r, K), B0 (N, r)).

    At the average the linearized layer with uniform weights is exactly the average adapter. Weights that sum to one
    mix the skills' offsets into the offset of the mixture: A_z = A0 + Σ w (A_s − A0).

    Raises ValueError for a point of another shape.

    >>> import torch
    >>> A, B = torch.randn(4, 8, 16, 2), torch.randn(4, 8, 2, 24)
    >>> around = center(A, B)
    >>> bool(around.A.mean(1).abs().max() < 1e-6)
    True
    """
    A0, B0 = average(A, B)
    if point is not None:
        if point[0].shape != A0.shape or point[1].shape != B0.shape:
            raise ValueError(
                f"a point A0 {tuple(A0.shape)}, B0 {tuple(B0.shape)} is expected, got "
                f"{tuple(point[0].shape)}, {tuple(point[1].shape)}"
            )
        A0, B0 = point
    skill_A, skill_B = skill(A0, B0, A.shape[0])
    return Centered(A0, B0, A - skill_A, B - skill_B)


def skill(A: Tensor, B: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """A LoRA adapter (r, K), (N, r) as an inventory of one skill: (Q, 1, K/Q, r), (Q, 1, r, N/Q).

    >>> import torch
    >>> A, B = torch.randn(2, 12), torch.randn(8, 2)
    >>> back = average(*skill(A, B, heads=4))
    >>> torch.equal(back[0], A), torch.equal(back[1], B)
    (True, True)
    """
    blocks_A = A.t().unflatten(0, (heads, -1)).unsqueeze(1)
    return blocks_A, B.t().unflatten(1, (heads, -1)).transpose(0, 1).unsqueeze(1)


def in_words(skills: int, heads: int) -> str:
    """The size of an inventory, for reports.

    >>> in_words(4, 1)
    '4 skills in 1 head'
    """
    return f"{skills} skill{'s' * (skills != 1)} in {heads} head{'s' * (heads != 1)}"
