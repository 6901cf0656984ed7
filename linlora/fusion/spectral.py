"""Methods that act on the singular vectors of ΔW, in weight space: TSV-M, Iso-C, Iso-CTS, and WUDI's minimiser.

They commute with rotations, so core space gives what the N×K matrices give. All are on the support only: the published
forms take as many singular vectors of N×K matrices as there are rows and tasks, and of low-rank adapters most of those
are LAPACK's choice (results of two drivers are 60 to 100 % apart). Options λ are searched on a validation split.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from linlora.fusion.checks import check_number
from linlora.fusion.core_space import Core, Pair, Rule, in_core_space, shadow, support
from linlora.fusion.layerwise import fused_layers, weight_vectors
from linlora.fusion.truncation import OutRank
from linlora.vectors.task_vector import TaskVector

PUBLISHED_COMMON = 0.8


def tsv(
    vectors: Iterable[TaskVector], scaling: float = 1.0, out_rank: OutRank = "exact", energy: float | None = None
) -> TaskVector:
    """TSV-Merge: the singular vectors of all tasks, made orthogonal to one another (arXiv 2412.00081).

    With ΔWₜ = Pₜ Σₜ Qₜᵀ of its own rank: λ · polar([P₁ … P_T]) · diag(Σ₁ … Σ_T) · polar([Q₁ … Q_T])ᵀ, where polar(X) is
    the nearest matrix of orthonormal columns. Published for as many triplets of each task as rows / T allow; an adapter
    here brings all it has. T equal adapters give that adapter.

    Args:
        scaling: λ; 1 as published without a search, searched in (0, 3] with one.
        out_rank, energy: cut the rank of the result (`linlora.fusion.truncation`).

    >>> import linlora
    >>> linlora.testing.tiny_model("bert", trained=True).save_pretrained("a")
    >>> a = linlora.formats.read("a")
    >>> round((tsv([a, a]) - a).norm() / a.norm(), 6)
    0.0
    """
    check_number("tsv", "scaling", scaling)

    def rule(core: Core) -> Pair:
        left, values, right = zip(*(core.support(*part) for part in core.parts), strict=True)
        return _shared(core.polar(torch.cat(left, 1)), torch.cat(values), core.polar(torch.cat(right, 1)), scaling)

    return _fused(vectors, rule, out_rank, energy)


def iso_c(
    vectors: Iterable[TaskVector],
    scaling: float = 1.0,
    mean_over: str = "support",
    out_rank: OutRank = "exact",
    energy: float | None = None,
) -> TaskVector:
    """Iso-C: every direction of the sum at one size, λ σ̄ U Vᵀ of Σ ΔWₜ = U Σ Vᵀ (arXiv 2502.04959).

    Args:
        scaling: λ; 1 unless searched, in (0, 3] as published.
        mean_over: σ̄ is the mean of the singular values of the sum, "support", or their sum over min(N, K), "matrix", as
            published for matrices of full rank. The two differ by a factor that λ makes up for.
        out_rank, energy: cut the rank of the result; all directions being of one size, it keeps any.
    """
    check_number("iso_c", "scaling", scaling)
    if mean_over not in ("support", "matrix"):
        raise ValueError(f"iso_c: mean_over is 'support' or 'matrix', got {mean_over!r}")

    def rule(core: Core) -> Pair:
        P, values, Q = core.support(core.total)
        over = max(1, len(values)) if mean_over == "support" else min(len(core.U.columns), len(core.V.columns))
        return _shared(P, values.sum() / over, Q, scaling)

    return _fused(vectors, rule, out_rank, energy)


def iso_cts(
    vectors: Iterable[TaskVector],
    scaling: float = 1.0,
    common: float = PUBLISHED_COMMON,
    out_rank: OutRank = "exact",
    energy: float | None = None,
) -> TaskVector:
    """Iso-CTS: the leading directions of the sum and, beside them, of each task, at one size (arXiv 2502.04959).

    Of the n directions that all adapters span, each task has m = round((n − ⌊common · n⌋) / T) of its own: the leading
    triplets of ΔWₜ − U_c U_cᵀ ΔWₜ, where U_c are those of the sum, n − T m of them. Both stacks are made orthonormal,
    and σ̄ is the mean of the singular values chosen. A sum or a task that has fewer directions gives those it has.

    Args:
        scaling: λ; 1 unless searched, in (0, 3] as published.
        common: the part of the directions that are the sum's; 0.8 as published.
        out_rank, energy: cut the rank of the result.
    """
    check_number("iso_cts", "scaling", scaling)
    check_number("iso_cts", "common", common)
    if not 0.0 <= common <= 1.0:
        raise ValueError(f"iso_cts: common is a part of the directions, at least 0 and at most 1, got {common}")

    def rule(core: Core) -> Pair:
        directions, tasks = min(len(core.support(side)[1]) for side in core.beside()), len(core.parts)
        own = round((directions - int(common * directions)) / tasks)
        chosen = [tuple(part[..., : max(0, directions - tasks * own)] for part in core.support(core.total))]
        leading = chosen[0][0]
        for left, right in core.parts:
            rest = left - leading @ (leading.T @ left)
            larger = float((left @ right.T).norm() / (rest @ right.T).norm().clamp(min=1e-300))
            triplets = support(rest, right, core.tolerance * max(1.0, larger))
            chosen.append(tuple(part[..., :own] for part in triplets))
        P, values, Q = (torch.cat(parts, -1) for parts in zip(*chosen, strict=True))
        return _shared(core.polar(P), values.sum() / max(1, len(values)), core.polar(Q), scaling)

    return _fused(vectors, rule, out_rank, energy)


def wudi_minimiser(
    vectors: Iterable[TaskVector], scaling: float = 1.0, out_rank: OutRank = "exact", energy: float | None = None
) -> TaskVector:
    """The τ of least interference, argmin Σₜ ‖(τ − ΔWₜ) ΔWₜᵀ‖² / ‖ΔWₜ‖², times λ: the loss of WUDI (arXiv 2503.08099).

    WUDI goes 300 steps of Adam on the entries of τ from the sum, which depends on the size of ΔW and on the basis; this
    is where it would end, in closed form. Where the rows of all Aₜ are independent the loss is 0.

    Args:
        scaling: λ; 1 as published.
        out_rank, energy: cut the rank of the result.
    """
    check_number("wudi_minimiser", "scaling", scaling)

    def rule(core: Core) -> Pair:
        sides, targets = [], []
        for left, right in core.parts:
            side = shadow(right, left)  # Mₜᵀ
            size = side.norm().clamp(min=torch.finfo(side.dtype).tiny)
            sides.append(side / size)
            targets.append(left @ (right.T @ side) / size)
        P, values, Q = core.support(torch.cat(sides, 1))
        return scaling * (torch.cat(targets, 1) @ Q / values), P

    return _fused(vectors, rule, out_rank, energy)


def _shared(P: Tensor, values: Tensor, Q: Tensor, scaling: float) -> Pair:
    """λ P diag(σ) Qᵀ, with σ and λ shared between the factors."""
    root = values.sqrt() * abs(scaling) ** 0.5
    return P * (root if scaling > 0.0 else -root), Q * root


def _fused(vectors: Iterable[TaskVector], rule: Rule, out_rank: OutRank, energy: float | None) -> TaskVector:
    return fused_layers(weight_vectors(vectors), in_core_space(rule), out_rank=out_rank, energy=energy)
