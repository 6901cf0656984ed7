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
from linlora.fusion.truncation import Basis, Factored, basis, triplets

_CANCELLED = 1e-12
"""The size of a matrix against those it is the sum of, below which it is rounding."""

Pair = tuple[Tensor, Tensor]
"""left (p, k) and right (q, k) of a matrix left · rightᵀ, float64."""
Triplets = tuple[Tensor, Tensor, Tensor]
"""P (p, k), σ (k,) and Q (q, k) of a matrix P diag(σ) Qᵀ."""


@dataclass(frozen=True)
class Core:
    """The ΔW of a layer in shared bases.

    Attributes:
        U, V: bases of the columns, (N, p), and of the rows, (K, q).
        parts: Uᵀ Bₜ and (Aₜ V)ᵀ of each Mₜ.
        tolerance: the part of the largest singular value below which one is rounding of the factors as they are stored.
    """

    U: Basis
    V: Basis
    parts: list[Pair]
    tolerance: float

    @classmethod
    def of(cls, layer: Layer) -> Core:
        """The core space of a layer.

        >>> from linlora.layers.weights import Update
        >>> updates = [Update(torch.randn(2, 9), torch.randn(7, 2)) for _ in range(2)]
        >>> core = Core.of(Layer("q", [0, 1], updates))
        >>> [tuple(M.shape) for M in core.matrices]
        [(4, 4), (4, 4)]
        >>> back = Factored(core.U, *core.parts[1], core.V).update()
        >>> torch.allclose(back.B @ back.A, updates[1].B @ updates[1].A, atol=1e-5)
        True
        """
        U, left = basis(torch.cat([update.B for update in layer.updates], dim=1))
        V, right = basis(torch.cat([update.A for update in layer.updates]).T)
        ranks = [len(update.A) for update in layer.updates]
        return cls(U, V, list(zip(left.split(ranks, 1), right.split(ranks, 1), strict=True)), tolerance(layer))

    @property
    def matrices(self) -> list[Tensor]:
        """Each Mₜ (p, q)."""
        return [left @ right.T for left, right in self.parts]

    @property
    def total(self) -> Tensor:
        """Σ Mₜ; exactly zero where the ΔW cancel to rounding."""
        matrices = self.matrices
        total = torch.stack(matrices).sum(0)
        size = sum(float(M.norm()) for M in matrices)
        return total if float(total.norm()) > _CANCELLED * size else torch.zeros_like(total)

    def support(self, left: Tensor, right: Tensor | None = None) -> Triplets:
        """The singular triplets of a matrix, or of left · rightᵀ, without what is rounding."""
        return support(left, right, self.tolerance)

    def beside(self) -> Pair:
        """[M₁ … M_T] and [M₁ᵀ … M_Tᵀ], each but for an orthonormal matrix at its right: (p, Σ k) and (q, Σ k)."""
        return (
            torch.cat([shadow(left, right) for left, right in self.parts], 1),
            torch.cat([shadow(right, left) for left, right in self.parts], 1),
        )

    def polar(self, columns: Tensor) -> Tensor:
        """The nearest columns that are orthonormal: P Qᵀ of P diag(σ) Qᵀ, on the support."""
        P, _, Q = self.support(columns)
        return P @ Q.T


def tolerance(layer: Layer) -> float:
    """The part of a layer's largest singular value below which one is rounding of its factors as they are stored."""
    return max(layer.updates[0].B.shape[0] * 1e-15, *(16 * torch.finfo(u.A.dtype).eps for u in layer.updates))


def support(left: Tensor, right: Tensor | None, tolerance: float) -> Triplets:
    """The singular triplets of a matrix, or of left · rightᵀ, whose values are above a part of the largest.

    >>> support(torch.tensor([[2.0, 0.0], [0.0, 1e-9]]).double(), None, 1e-6)[1].tolist()
    [2.0]
    """
    P, values, Q = triplets(left, right)
    kept = values > tolerance * values[:1].sum()
    return P[:, kept], values[kept], Q[:, kept]


def shadow(left: Tensor, right: Tensor) -> Tensor:
    """left · rightᵀ but for an orthonormal matrix at its right: left Rᵀ of right = Q R.

    >>> float(shadow(torch.tensor([[2.0]]), torch.tensor([[3.0], [4.0]])).abs())
    10.0
    """
    return left @ torch.linalg.qr(right, mode="r").R.T


Rule = Callable[[Core], Pair]
"""The small matrices of a layer into one, as a pair."""


def in_core_space(rule: Rule) -> Merge:
    """A rule of small matrices as a way to merge the ΔW of a layer."""

    def merge(layer: Layer) -> Factored:
        core = Core.of(layer)
        left, right = rule(core)
        return Factored(core.U, left, right, core.V)

    return merge
