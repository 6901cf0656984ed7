"""TIES where ΔW = s B A are compared value by value: in a basis of the ΔW alone (KnOTS), or in a compressed one.

A matrix of full rank comes out of TIES on the values of ΔW, and another result out of every other basis. The bases here
are singular vectors, so they are a function of the ΔW: neither the order of the adapters matters nor how their size is
shared between A and B. Signs of singular vectors do not matter either, so a sum of zero gives zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from linlora.fusion.checks import check_count, check_number
from linlora.fusion.core_space import Core
from linlora.fusion.layerwise import Layer, fused_layers, layers, weight_vectors
from linlora.fusion.quantiles import kept_from
from linlora.fusion.truncation import OutRank, Spectrum
from linlora.layers.weights import Update, one_thread
from linlora.vectors.task_vector import TaskVector

PUBLISHED_KEEP, PUBLISHED_SCALING = 0.2, 0.6
_ROUNDING = 1e-12


def knots_ties(
    vectors: Iterable[TaskVector],
    keep: float = PUBLISHED_KEEP,
    scaling: float = PUBLISHED_SCALING,
    out_rank: OutRank = "exact",
    energy: float | None = None,
) -> TaskVector:
    """KnOTS-TIES: λ U · TIES(Σ V₁ᵀ, …, Σ V_Tᵀ) of [ΔW₁ … ΔW_T] = U Σ [V₁ᵀ … V_Tᵀ] (arXiv 2410.19735).

    Trim: of the values of a task over all layers the largest are kept. Elect: the sign of the sum. Mean: of the values
    that have it. The result has the rank of all adapters together, and nothing is lost.

    Args:
        keep: the part of the values of each task that are kept; 0.2 as published, 1 for Llama-3-8B.
        scaling: λ; 0.6 as published for ViT-B/32, 0.5 for ViT-L and Llama-3-8B.
        out_rank, energy: cut the rank of the result (`linlora.fusion.truncation`).

    Goes through the adapters three times, twice for the magnitude where each is trimmed.
    """
    check_number("knots_ties", "scaling", scaling)
    check_keep("knots_ties", keep)
    in_weights = weight_vectors(vectors)

    def pieces() -> Iterator[dict[int, Tensor]]:
        for layer in layers(in_weights):
            with one_thread():
                _, coordinates = aligned(layer)
            yield {i: values.float().flatten() for i, values in zip(layer.indices, coordinates, strict=True)}

    smallest = kept_from(pieces, len(in_weights), keep)

    def merge(layer: Layer) -> Update:
        U, coordinates = aligned(layer)
        kept = [trimmed(values, smallest[i]) for i, values in zip(layer.indices, coordinates, strict=True)]
        return Update(scaling * disjoint_mean(kept), U)

    return fused_layers(in_weights, merge, out_rank=out_rank, energy=energy)


def compress_then_merge(
    vectors: Iterable[TaskVector],
    rank: int = 16,
    scaling: float = 0.75,
    keep: float = 0.25,
    beta: float = 0.25,
    rounds: int = 1000,
) -> TaskVector:
    """Compress-then-Merge: TIES of the ΔW in the r left and r right directions that fit all best (arXiv 2606.03723).

    U₀ and U₁ by higher-order orthogonal iteration on Mₜ (β + (1 − β) mean ‖M‖ / ‖Mₜ‖), from the singular vectors of the
    ΔW side by side; Cₜ = U₀ᵀ ΔWₜ U₁ of ΔWₜ itself; λ U₀ TIES(C₁ … C_T) U₁ᵀ. The result has rank r by construction, and
    what lies outside U₀ and U₁ is lost. Of plain sums, truncation loses less.

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
        norms = [float(M.norm()) for M in core.parts]
        mean = sum(norms) / len(norms)
        drawn = [M * (beta + (1 - beta) * mean / n) for M, n in zip(core.parts, norms, strict=True) if n > 0.0]
        left, right = tucker(drawn, rank, rounds) if drawn else (core.total[:, :0], core.total.T[:, :0])
        merged = []
        for M in core.parts:
            C = left.T @ M @ right
            flat = C.abs().flatten().sort(descending=True).values
            merged.append(trimmed(C, float(flat[max(1, int(keep * len(flat))) - 1]) if len(flat) else 0.0))
        return Spectrum.between(core.U @ left, scaling * disjoint_mean(merged), core.V @ right)

    return fused_layers(weight_vectors(vectors), merge, out_rank=rank)


def aligned(layer: Layer) -> tuple[Tensor, list[Tensor]]:
    """U (N, p) of [ΔW₁ … ΔW_T] = U Σ [V₁ᵀ … V_Tᵀ], and each Σ Vₜᵀ (p, K), exactly zero where it is rounding."""
    core = Core.of(layer)
    P, _, _ = core.support(torch.cat(core.parts, 1))
    coordinates = []
    for M in core.parts:
        values = P.T @ M
        rows = values.norm(dim=1, keepdim=True) > _ROUNDING * M.norm()
        coordinates.append((values * rows) @ core.V.T)
    return core.U @ P, coordinates


def tucker(parts: Sequence[Tensor], rank: int, rounds: int) -> tuple[Tensor, Tensor]:
    """The r directions of the columns and of the rows of some matrices that keep most of Σ ‖U₀ᵀ M U₁‖².

    >>> left, right = tucker([torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())] * 2, 2, 10)
    >>> left.abs().round().tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    left, right = leading(torch.cat(list(parts), 1), rank), leading(torch.cat([M.T for M in parts], 1), rank)
    fit = 0.0
    for _ in range(rounds):
        left = leading(torch.cat([M @ right for M in parts], 1), rank)
        right = leading(torch.cat([M.T @ left for M in parts], 1), rank)
        before, fit = fit, float(sum((left.T @ M @ right).square().sum() for M in parts)) ** 0.5
        if fit - before <= 1e-6 * fit:
            break
    return left, right


def leading(columns: Tensor, rank: int) -> Tensor:
    """The first left singular vectors, by the Gram matrix: there are many more columns than rows."""
    return torch.linalg.eigh(columns @ columns.T).eigenvectors.flip(1)[:, :rank]


def trimmed(values: Tensor, smallest: float) -> Tensor:
    """Values whose magnitude in float32 is at least one of float32; zeros in place of the others."""
    return torch.where(values.float().abs() >= smallest, values, 0.0)


def disjoint_mean(parts: Sequence[Tensor]) -> Tensor:
    """Of every entry the mean of the values that have the sign of their sum, zeros not counted; 0 where that is 0.

    >>> disjoint_mean([torch.tensor([3.0, -1.0, 1.0]), torch.tensor([1.0, 4.0, -1.0])]).tolist()
    [2.0, 4.0, 0.0]
    """
    stacked = torch.stack(list(parts))
    total, size = stacked.sum(0), stacked.abs().sum(0)
    sign = torch.where(total.abs() > _ROUNDING * size, total.sign(), 0.0)
    agree = stacked.sign() == sign
    return torch.where(sign == 0, 0.0, (stacked * agree).sum(0) / agree.sum(0).clamp(min=1))


def check_keep(method: str, keep: float) -> None:
    """Raise a ValueError unless a part of the values is above 0 and at most 1."""
    check_number(method, "keep", keep)
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"{method}: keep is the part of the values kept, above 0 and at most 1, got {keep}")
