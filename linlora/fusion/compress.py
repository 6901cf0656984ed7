"""Compress-then-Merge: TIES of every ΔW in the few left and right directions that fit all of them best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from linlora.fusion.checks import check_count, check_number
from linlora.fusion.core_space import Core, Pair
from linlora.fusion.layerwise import Layer, fused_layers, weight_vectors
from linlora.fusion.sides import Sides, check_keep
from linlora.fusion.truncation import Factored
from linlora.vectors.task_vector import TaskVector

_FIT = 1e-6
_ROUNDING = 1e-12


def compress_then_merge(
    vectors: Iterable[TaskVector],
    rank: int = 16,
    scaling: float = 0.75,
    keep: float = 0.25,
    beta: float = 0.25,
    rounds: int = 1000,
) -> TaskVector:
    """λ U₀ TIES(C₁ … C_T) U₁ᵀ with Cₜ = U₀ᵀ ΔWₜ U₁, U₀ and U₁ of r columns each (arXiv 2606.03723).

    U₀ and U₁ by higher-order orthogonal iteration on ΔWₜ (β + (1 − β) mean ‖ΔW‖ / ‖ΔWₜ‖), from the singular vectors of
    the ΔW side by side; Cₜ is of ΔWₜ itself. The result has rank r by construction, and what lies outside U₀ and U₁ is
    lost. Of plain sums, truncation loses less.

    Args:
        rank: r. scaling: λ. keep: the part of the r² values of each task and layer that TIES keeps. beta: β, 1 for the
            norms as they are. rounds: of the iteration, at most. Defaults of the published example.
    """
    check_number("compress_then_merge", "scaling", scaling)
    check_number("compress_then_merge", "beta", beta)
    check_keep("compress_then_merge", keep)
    check_count("compress_then_merge", "rank", rank)
    check_count("compress_then_merge", "rounds", rounds)

    def merge(layer: Layer) -> Factored:
        core = Core.of(layer)
        P, Q = (core.support(side)[0] for side in core.beside())
        parts = [(P.T @ left, Q.T @ right) for left, right in core.parts]
        norms = [float((left @ right.T).norm()) for left, right in parts]
        mean = sum(norms) / len(norms)
        drawn = [(left * (beta + (1 - beta) * mean / norm), right)
                 for (left, right), norm in zip(parts, norms, strict=True) if norm > 0.0]  # fmt: skip
        U, V = tucker(drawn, rank, rounds) if drawn else (P[:0].T, Q[:0].T)
        cores = [(U.T @ left) @ (right.T @ V) for left, right in parts]
        merged = Sides.of(_largest(C, keep) for C in cores).mean(rounding=_ROUNDING)
        return Factored(core.U, P @ U @ (scaling * merged), Q @ V, core.V)

    return fused_layers(weight_vectors(vectors), merge, most=rank)


def tucker(parts: Sequence[Pair], rank: int, rounds: int) -> Pair:
    """The r directions of the columns and of the rows of matrices M = left · rightᵀ that keep most of Σ ‖U₀ᵀ M U₁‖².

    Ends where a round changes the relative error of the fit by less than 1e-6, as published, the third or later.

    >>> M = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
    >>> U, V = tucker([(M, torch.eye(3).double())] * 2, 2, 10)
    >>> U.abs().round().tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    longest = max(left.shape[1] for left, _ in parts)
    wide = [[pad(side, (0, longest - side.shape[1])) for side in part] for part in parts]
    lefts, rights = (torch.stack(sides) for sides in zip(*wide, strict=True))
    whole, error = float((lefts @ rights.mT).square().sum()), 1.0
    U, V = leading(lefts @ rights.mT, rank), leading(rights @ lefts.mT, rank)
    for round_ in range(rounds):
        U = leading(lefts @ (rights.mT @ V), rank)
        inside = rights @ (lefts.mT @ U)
        V = leading(inside, rank)
        before, error = error, (abs(whole - float((V.T @ inside).square().sum())) / whole) ** 0.5
        if round_ > 1 and abs(before - error) < _FIT:
            break
    return U, V


def leading(parts: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of matrices (T, p, m) side by side, by their Gram matrix."""
    beside = parts.transpose(0, 1).flatten(1)
    return torch.linalg.eigh(beside @ beside.T).eigenvectors.flip(1)[:, :rank]


def _largest(C: Tensor, keep: float) -> Tensor:
    """The largest of the values of a small matrix; zeros in place of the others."""
    sizes = C.abs().flatten()
    return C * (C.abs() >= sizes.topk(max(1, int(keep * len(sizes)))).values[-1]) if len(sizes) else C
