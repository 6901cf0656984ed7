"""Mixing inventories and its adjoint on the `torch` backend: one batched product a factor, and two more backward."""

from __future__ import annotations

import torch
from torch import Tensor

Factors = list[Tensor | None]


def mix_inventories(As: Factors, Bs: list[Tensor], mixtures: list[Tensor]) -> tuple[Factors, list[Tensor]]:
    """The factors (T, K, r) and (T, r, N) of every layer's inventory A (Q, S, K/Q, r), B (Q, S, r, N/Q)."""
    mixed_As = [None if A is None else _mix(A, w).flatten(1, 2) for A, w in zip(As, mixtures, strict=True)]
    mixed_Bs = [_mix(B, w).transpose(1, 2).flatten(2) for B, w in zip(Bs, mixtures, strict=True)]
    return mixed_As, mixed_Bs


def unmix_inventories(
    d_As: Factors,
    d_Bs: Factors,
    As: Factors,
    Bs: list[Tensor],
    mixtures: list[Tensor],
    As_need: list[bool],
    Bs_need: list[bool],
    mixtures_need: list[bool],
) -> tuple[Factors, Factors, Factors]:
    """The gradients of the inventories and of the weights from those of the mixed factors; None for what is not
    needed, and for layers that no gradient has reached."""
    out: tuple[Factors, Factors, Factors] = ([], [], [])
    layers = zip(d_As, d_Bs, As, Bs, mixtures, As_need, Bs_need, mixtures_need, strict=True)
    for d_A, d_B, A, B, w, A_needs, B_needs, w_needs in layers:
        heads, d_w = B.shape[0], None
        if d_A is not None:
            d_A = d_A.unflatten(1, (heads, -1)).transpose(0, 1).flatten(2)
        if d_B is not None:
            d_B = d_B.unflatten(2, (heads, -1)).permute(2, 0, 1, 3).flatten(2)
        for gradients, inventory, d_mixed, needs in ((out[0], A, d_A, A_needs), (out[1], B, d_B, B_needs)):
            d_inventory = None
            if inventory is not None and d_mixed is not None and needs:
                per_head = w.to(d_mixed.dtype).transpose(0, 1)
                d_inventory = torch.bmm(per_head.mT, d_mixed).view(inventory.shape).to(inventory.dtype)
            if inventory is not None and d_mixed is not None and w_needs:
                part = torch.bmm(d_mixed, inventory.to(d_mixed.dtype).flatten(2).mT)
                d_w = part if d_w is None else d_w + part
            gradients.append(d_inventory)
        out[2].append(None if d_w is None else d_w.transpose(0, 1).to(w.dtype))
    return out


def _mix(inventory: Tensor, mixture: Tensor) -> Tensor:
    """Σ_s w_qs inventory_qs: (T, Q, a, b), in the wider of the dtypes."""
    dtype = torch.promote_types(inventory.dtype, mixture.dtype)
    mixed = torch.bmm(mixture.to(dtype).transpose(0, 1), inventory.to(dtype).flatten(2))
    return mixed.transpose(0, 1).unflatten(2, inventory.shape[2:])
