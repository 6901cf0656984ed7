"""Core space: every ΔW of a layer as a small matrix in bases that all of them share, ΔWₜ = U Mₜ Vᵀ exactly.

U (N, p) is an orthonormal basis of the columns of all Bₜ, V (K, q) of the rows of all Aₜ, and Mₜ = (Uᵀ Bₜ)(Aₜ V), whose
sides are at most the sum of the ranks (arXiv 2509.17786). A method that commutes with rotations gives here what it does
for the N×K matrices, which are never formed.

The support of a matrix are its singular values that are more than rounding. The others have no direction of their own:
LAPACK chooses one that depends on the driver, and methods that lift every direction to one size would lift it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linlora.fusion.layerwise import Layer, Merge
from linlora.fusion.truncation import Spectrum, basis

_CANCELLED = 1e-12
"""The size of a matrix against those it is the sum of, below which it is rounding."""


@dataclass(frozen=True)
class Core:
    """The ΔW of a layer in shared bases.

    Attributes:
        U, V: (N, p) and (K, q), orthonormal columns, float64.
        parts: each Mₜ (p, q).
        tolerance: the part of the largest singular value below which one is rounding of the factors as they are stored.
    """

    U: Tensor
    V: Tensor
    parts: list[Tensor]
    tolerance: float

    @classmethod
    def of(cls, layer: Layer) -> Core:
        """The core space of a layer.

        >>> from linlora.layers.weights import Update
        >>> updates = [Update(torch.randn(2, 9), torch.randn(7, 2)) for _ in range(2)]
        >>> core = Core.of(Layer("q", [0, 1], updates))
        >>> [tuple(M.shape) for M in core.parts]
        [(4, 4), (4, 4)]
        >>> torch.allclose((core.U @ core.parts[1] @ core.V.T).float(), updates[1].B @ updates[1].A, atol=1e-5)
        True
        """
        U, Bs = basis(torch.cat([update.B for update in layer.updates], dim=1).double())
        V, As = basis(torch.cat([update.A for update in layer.updates]).double().T)
        ranks = [len(update.A) for update in layer.updates]
        parts = [B @ A.T for B, A in zip(Bs.split(ranks, 1), As.split(ranks, 1), strict=True)]
        return cls(U, V, parts, tolerance(layer))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.U), len(self.V)

    @property
    def total(self) -> Tensor:
        """Σ Mₜ; exactly zero where the ΔW cancel to rounding."""
        total = torch.stack(self.parts).sum(0)
        size = sum(float(M.norm()) for M in self.parts)
        return total if float(total.norm()) > _CANCELLED * size else torch.zeros_like(total)

    def support(self, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """P (p, k), σ (k,) and Q (q, k) with M = P diag(σ) Qᵀ, without what is rounding."""
        return support(M, self.tolerance)

    def polar(self, columns: Tensor) -> Tensor:
        """The nearest columns that are orthonormal: P Qᵀ of P diag(σ) Qᵀ, on the support."""
        P, _, Q = self.support(columns)
        return P @ Q.T


def tolerance(layer: Layer) -> float:
    """The part of a layer's largest singular value below which one is rounding of its factors as they are stored."""
    return max(layer.updates[0].B.shape[0] * 1e-15, *(16 * torch.finfo(u.A.dtype).eps for u in layer.updates))


def support(M: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of a matrix whose values are above a part of the largest.

    >>> support(torch.tensor([[2.0, 0.0], [0.0, 1e-9]]).double(), 1e-6)[1].tolist()
    [2.0]
    """
    P, values, Qt = torch.linalg.svd(M, full_matrices=False)
    kept = values > tolerance * values[:1].sum()
    return P[:, kept], values[kept], Qt[kept].T


Rule = Callable[[Core], Tensor]
"""The small matrices of a layer into one (p, q)."""


def in_core_space(rule: Rule) -> Merge:
    """A rule of small matrices as a way to merge the ΔW of a layer."""

    def merge(layer: Layer) -> Spectrum:
        core = Core.of(layer)
        return Spectrum.between(core.U, rule(core), core.V)

    return merge
