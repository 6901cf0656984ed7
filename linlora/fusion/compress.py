"""Compress-then-Merge: TIES of every ΔW in the few left and right directions that fit all of them best."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from linlora.fusion.checks import check_count, check_number
from linlora.fusion.core_space import Core
from linlora.fusion.layerwise import Layer, fused_layers, weight_vectors
from linlora.fusion.sides import Sides, check_keep
from linlora.fusion.truncation import Spectrum
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

    def merge(layer: Layer) -> Spectrum:
        core = Core.of(layer)
        P, Q = (core.support(torch.cat(side, 1))[0] for side in (core.parts, [M.T for M in core.parts]))
        parts = P.T @ torch.stack(core.parts) @ Q
        norms = parts.flatten(1).norm(dim=1)
        there = norms > 0.0
        drawn = parts[there] * (beta + (1 - beta) * norms.mean() / norms[there])[:, None, None]
        left, right = tucker(drawn, rank, rounds)
        cores = left.T @ parts @ right
        merged = Sides.of(_largest(C, keep) for C in cores).mean(rounding=_ROUNDING)
        return Spectrum.between(core.U @ (P @ left), scaling * merged, core.V @ (Q @ right))

    return fused_layers(weight_vectors(vectors), merge, out_rank=rank)


def tucker(parts: Tensor, rank: int, rounds: int) -> tuple[Tensor, Tensor]:
    """The r directions of the columns and of the rows of matrices (T, p, q) that keep most of Σ ‖U₀ᵀ M U₁‖².

    Ends where a round changes the relative error of the fit by less than 1e-6, as published, the third or later.

    >>> left, right = tucker(torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()).expand(2, 3, 3), 2, 10)
    >>> left.abs().round().tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    flipped = parts.transpose(1, 2)
    whole, error = float(parts.square().sum()), 1.0
    left, right = leading(parts, rank), leading(flipped, rank)
    for round_ in range(rounds if whole else 0):
        left = leading(parts @ right, rank)
        inside = flipped @ left
        right = leading(inside, rank)
        before, error = error, (abs(whole - float((right.T @ inside).square().sum())) / whole) ** 0.5
        if round_ > 1 and abs(before - error) < _FIT:
            break
    return left, right


def leading(parts: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of matrices (T, p, m) side by side, by their Gram matrix."""
    beside = parts.transpose(0, 1).flatten(1)
    return torch.linalg.eigh(beside @ beside.T).eigenvectors.flip(1)[:, :rank]


def _largest(C: Tensor, keep: float) -> Tensor:
    """The largest of the values of a small matrix; zeros in place of the others."""
    sizes = C.abs().flatten()
    return C * (C.abs() >= sizes.topk(max(1, int(keep * len(sizes)))).values[-1]) if len(sizes) else C
