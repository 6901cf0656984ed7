"""Mixing inventories and its adjoint on the `torch` backend: one batched product a factor, and two more backward.

A weight of exactly 0 does not select its skill: what is not finite there reaches neither the task's factors nor, in
backward, the skill's gradient from the task.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from linlora.ops.transforms import readable

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
            d_A = d_A.unflatten(1, (heads, d_A.shape[1] // heads)).transpose(0, 1).flatten(2)
        if d_B is not None:
            d_B = d_B.unflatten(2, (heads, d_B.shape[2] // heads)).permute(2, 0, 1, 3).flatten(2)
        for gradients, inventory, d_mixed, needs in ((out[0], A, d_A, A_needs), (out[1], B, d_B, B_needs)):
            d_inventory = None
            if inventory is not None and d_mixed is not None and needs:
                per_head = w.to(d_mixed.dtype).transpose(0, 1)
                d_inventory = selected(per_head.mT, d_mixed).view(inventory.shape).to(inventory.dtype)
            if inventory is not None and d_mixed is not None and w_needs:
                part = torch.bmm(d_mixed, inventory.to(d_mixed.dtype).flatten(2).mT)
                d_w = part if d_w is None else d_w + part
            gradients.append(d_inventory)
        out[2].append(None if d_w is None else d_w.transpose(0, 1).to(w.dtype))
    return out


def _mix(inventory: Tensor, mixture: Tensor) -> Tensor:
    """Σ_s w_qs inventory_qs: (T, Q, a, b), in the wider of the dtypes."""
    dtype = torch.promote_types(inventory.dtype, mixture.dtype)
    mixed = selected(mixture.to(dtype).transpose(0, 1), inventory.to(dtype).flatten(2))
    return mixed.transpose(0, 1).unflatten(2, inventory.shape[2:])


def selected(weights: Tensor, values: Tensor, selects: Tensor | None = None) -> Tensor:
    """Σ_j w_ij v_j over the j with w_ij ≠ 0, or those that `selects` says: (Q, I, c) of weights (Q, I, J), v (Q, J, c).

    Where everything is finite that is the product itself, which a CPU looks at by a sum: it is finite only where all
    of them are. Elsewhere nothing waits to look: the product of the finite values, with NaN where a selected weight
    meets another one.
    """
    product = torch.bmm(weights, values)
    if readable(product) and isfinite(product.sum(dtype=torch.promote_types(product.dtype, torch.float32)).item()):
        return product
    selects = weights != 0 if selects is None else selects
    finite = values.isfinite()
    reached = torch.bmm(selects.to(values.dtype), (~finite).to(values.dtype)) > 0
    of_finite = torch.bmm(torch.where(selects, weights, 0.0), torch.where(finite, values, 0.0))
    return torch.where(reached, torch.nan, of_finite)
