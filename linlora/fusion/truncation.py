"""Cuts ΔW to the best adapter of a smaller rank, and says what the cut loses.

No matrix of rank k is nearer to ΔW than its k largest singular triplets, and the squared error is the sum of the other
σ². They come from the factors alone: orthonormal bases of B and Aᵀ, and the SVD of an R×R matrix between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from linlora.layers.weights import Update

OutRank = int | Literal["exact"]
"""The rank of the fused adapter: a number, or that of all adapters together."""
_RESOLVED = 1e-14
"""An eigenvalue of a Gram matrix of unit columns, against the largest, below which it is rounding."""
_FLAT = 1e-3
"""The smallest eigenvalue against the largest, above which eigenvectors alone are orthonormal to 1e-13."""
_DEPENDENT = 1e-12
"""The length of what is left of a unit column, below which the column is dependent on the others."""


@dataclass(frozen=True)
class Spectrum:
    """ΔW = left · diag(values) · rightᵀ, (N, k), (k,) and (K, k): orthonormal columns, the largest value first."""

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, update: Update) -> Spectrum:
        """The singular triplets of ΔW, in float64.

        >>> update = Update(torch.eye(3)[:2], torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        >>> Spectrum.of(update).values.tolist()
        [3.0, 2.0]
        """
        U, inside = basis(update.B.double())
        V, outside = basis(update.A.double().T)
        return cls.between(U, inside @ outside.T, V)

    @classmethod
    def between(cls, U: Tensor, M: Tensor, V: Tensor) -> Spectrum:
        """The singular triplets of U M Vᵀ, for orthonormal columns U and V."""
        P, values, Qt = torch.linalg.svd(M, full_matrices=False)
        return cls(U @ P, values, V @ Qt.T)

    def update(self, rank: int) -> Update:
        """The best ΔW of a rank, σ shared between the factors; filled up with zeros where there are fewer values."""
        roots = self.values[:rank].sqrt()
        missing = rank - len(roots)
        left, right = self.left[:, :rank] * roots, self.right[:, :rank] * roots
        return Update(pad(right, (0, missing)).T, pad(left, (0, missing)))


@dataclass(frozen=True)
class Cut:
    """The place where singular values are cut: at a rank, at a part of Σ σ², or, "exact", nowhere.

    Raises ValueError for a rank that is no whole number above 0, and an energy that is no part of one.
    """

    out_rank: OutRank = "exact"
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.out_rank != "exact" and (not isinstance(self.out_rank, Integral) or self.out_rank < 1):
            raise ValueError(f"fuse: out_rank has to be a whole number, at least 1, or 'exact', got {self.out_rank!r}")
        if self.energy is not None and (not isinstance(self.energy, Real) or not 0.0 < self.energy <= 1.0):
            raise ValueError(f"fuse: energy is the part of Σ σ² kept, above 0 and at most 1, got {self.energy!r}")
        if self.energy is not None and self.out_rank != "exact":
            raise ValueError("fuse: out_rank and energy both say where to cut; give one of them")

    @property
    def exact(self) -> bool:
        return self.out_rank == "exact" and self.energy is None

    @staticmethod
    def significant(values: Tensor) -> Tensor:
        """Singular values, the largest first, with zeros for those that are rounding."""
        return values * (values > _DEPENDENT * values[:1].sum())

    def rank(self, values: Tensor) -> int:
        """The number of singular values that are kept; at least 1, the least that an adapter has.

        >>> Cut(energy=0.9).rank(torch.tensor([3.0, 1.0, 0.1])), Cut(out_rank=5).rank(torch.tensor([3.0, 1.0, 0.1]))
        (2, 3)
        """
        there = int(self.significant(values).count_nonzero())
        if self.energy is not None:
            kept = values.square().cumsum(0)
            there = min(there, 1 + int((kept < self.energy * kept[-1]).sum())) if there else 0
        elif self.out_rank != "exact":
            there = min(there, int(self.out_rank))
        return max(1, there)


def basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis U of the span of some columns, and Uᵀ columns; zeros and what is dependent are left out.

    By eigenvectors of the Gram matrix of the columns at length one, and once more of what those leave, so that a
    direction which is small in every column is found with its digits. Matrix products, on a CPU several times as fast
    as a QR decomposition.

    Args:
        columns: float64.

    >>> columns = torch.eye(5, dtype=torch.float64)[:, [0, 1, 1]]
    >>> U, inside = basis(columns * torch.tensor([1.0, 0.125, 3.0]))
    >>> U.shape, inside.abs().sort(0).values.tolist()
    (torch.Size([5, 2]), [[0.0, 0.0, 0.0], [1.0, 0.125, 3.0]])
    """
    gram = columns.T @ columns
    lengths = gram.diagonal().sqrt()
    there = lengths > 0
    if bool(there.all()) and len(lengths):
        values, vectors = torch.linalg.eigh(gram / lengths / lengths[:, None])
        if float(values[0]) > _FLAT * float(values[-1]):  # as many directions as columns, each with its digits
            combined = vectors / values.sqrt() / lengths[:, None]
            return columns @ combined, combined.T @ gram
    U = _basis_of_any(columns[:, there] / lengths[there])
    return U, U.T @ columns


def _basis_of_any(columns: Tensor) -> Tensor:
    """The basis of columns of length one, which may be nearly dependent."""
    rest, found, rounding = columns, columns[:, :0], _RESOLVED
    for _ in range(2):
        if not rest.shape[1]:
            break
        values, vectors = torch.linalg.eigh(rest.T @ rest)
        kept = values > max(_RESOLVED, rounding**2) * values[-1]
        near = rest @ (vectors[:, kept] / values[kept].sqrt())
        lower = torch.linalg.cholesky(near.T @ near)
        near = torch.linalg.solve_triangular(lower.T, near, upper=True, left=False)
        found = torch.cat([found, near], dim=1)
        rest = columns - found @ (found.T @ columns)
        lengths = rest.norm(dim=0)
        left = lengths > _DEPENDENT
        columns, rest = columns[:, left], rest[:, left] / lengths[left]
        rest = rest - found @ (found.T @ rest)
        rounding = _RESOLVED / float(lengths.max().clamp(min=_RESOLVED))
    return found
