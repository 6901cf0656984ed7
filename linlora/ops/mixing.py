"""Mixing an inventory of skills: the factors of a task, and the routed layer by mixed activations.

An inventory is A (Q, S, K/Q, r) and B (Q, S, r, N/Q): S skills of rank r, cut into Q heads. Where many rows share a
task its factors are mixed once (`mix_factors`), for S r (K + N) FLOPs twice a task. Where hardly any rows do, the
skills' activations are mixed instead (`by_activations`), as one LoRA layer of rank S r:

    u = Σ_qs w_qs (x_q A_qs)           y_q += s Σ_s (w_qs u) B_qs

That form has static shapes and asks nothing of the host, so it also is the one that `torch.func` transforms and
torch.compile see, and the one of a GPU without a grouped kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot


def mix_factors(A: Tensor | None, B: Tensor, mixture: Tensor) -> tuple[Tensor | None, Tensor]:
    """The factors (T, K, r) and (T, r, N) of T mixtures (T, Q, S), in the wider of the dtypes; differentiable."""
    mixed_A = None if A is None else _mix(A, mixture).flatten(1, 2)
    return mixed_A, _mix(B, mixture).transpose(1, 2).flatten(2)


def _mix(inventory: Tensor, mixture: Tensor) -> Tensor:
    """Σ_s w_qs inventory_qs: (T, Q, a, b)."""
    dtype = torch.promote_types(inventory.dtype, mixture.dtype)
    mixed = torch.bmm(mixture.to(dtype).transpose(0, 1), inventory.to(dtype).flatten(2))
    return mixed.transpose(0, 1).unflatten(2, inventory.shape[2:])


def by_activations(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    mixture: Tensor,
    scaling: float,
    task_ids: Tensor,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
) -> Tensor:
    """The routed layer of a matrix x (M, K) with task_ids (M,), composed of differentiable aten calls."""
    if 0 < mixture.shape[0] <= mixture.shape[2]:  # no more tasks than skills: their factors are the smaller inventory
        A, B = mix_factors(A, B, mixture)
        A, B = None if A is None else A.unsqueeze(0), B.unsqueeze(0)
        w = one_hot(task_ids, mixture.shape[0]).to(x.dtype).unsqueeze(0)
    else:
        wide = mixture.to(torch.promote_types(mixture.dtype, torch.float32))  # backward sums a task's rows in it
        w = wide[task_ids].to(x.dtype).transpose(0, 1)  # (Q, M, S)
    y = linear(x, _like(x, weight), None if bias is None else _like(x, bias))
    c = None if A is None or (A0 is not None and B0 is None) else _shrink(x, _like(x, A), w)
    if A0 is None:
        assert c is not None
        return torch.add(y, _expand(c, _like(x, B), w), alpha=scaling)
    u = linear(x, _like(x, A0))
    y = torch.add(y, _expand(u, _like(x, B), w), alpha=scaling)
    return y if B0 is None else torch.addmm(y, u if c is None else u + c, _like(x, B0).t(), alpha=scaling)


def _shrink(x: Tensor, A: Tensor, w: Tensor) -> Tensor:
    """Σ_qs w_qs (x_q A_qs), (M, r), of weights (Q, M, S)."""
    heads, skills, _, rank = A.shape
    per_head = x.unflatten(1, (heads, -1)).transpose(0, 1)
    activations = torch.bmm(per_head, A.transpose(1, 2).flatten(2)).unflatten(2, (skills, rank))
    return (w.unsqueeze(-1) * activations).sum((0, 2))


def _expand(u: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """Σ_s (w_qs u) B_qs in every head q, (M, N)."""
    weighted = (w.unsqueeze(-1) * u.unsqueeze(1)).flatten(2)
    return torch.bmm(weighted, B.flatten(1, 2)).transpose(0, 1).flatten(1)


def _like(x: Tensor, tensor: Tensor) -> Tensor:
    return tensor.to(x.dtype)
