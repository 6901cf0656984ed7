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

from linlora.layers.weights import Update

OutRank = int | Literal["exact"]
"""The rank of the fused adapter: a number, or that of all adapters together."""
_RESOLVED = 1e-14
"""An eigenvalue of a Gram matrix of unit columns, against the largest, below which it is rounding."""
_FLAT = 1e-2
"""The smallest eigenvalue against the largest, above which eigenvectors alone are orthonormal to 1e-13."""
_NEAR = 1e-8
"""The same, above which they are orthonormal to float32's rounding, and products with the columns need float64."""
_DEPENDENT = 1e-12
"""The length of what is left of a unit column, below which the column is dependent on the others; so of sums."""


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns U (N, p): columns (N, c) times turn (c, p), or the columns themselves where that is None.

    U is never formed: what is asked for is U times a few columns more, in the dtype of the columns.
    """

    columns: Tensor
    turn: Tensor | None

    def times(self, coordinates: Tensor) -> Tensor:
        """U · coordinates (p, k), as one product with the columns."""
        turned = coordinates if self.turn is None else self.turn @ coordinates
        return self.columns @ turned.to(self.columns.dtype)


@dataclass(frozen=True)
class Factored:
    """ΔW = U left rightᵀ Vᵀ: left (p, k) and right (q, k), float64, in bases U of its columns and V of its rows."""

    U: Basis
    left: Tensor
    right: Tensor
    V: Basis

    @classmethod
    def of(cls, update: Update) -> Factored:
        """The same ΔW in bases of its own."""
        (U, left), (V, right) = basis(update.B), basis(update.A.T)
        return cls(U, left, right, V)

    def update(self, rank: int | None = None) -> Update:
        """The factors, the first ones alone for a rank; in the dtype of the columns."""
        return Update(self.V.times(self.right[:, :rank]).T, self.U.times(self.left[:, :rank]))

    def by_size(self) -> tuple[Tensor, Factored]:
        """The singular values, the largest first, and the same ΔW by singular vectors, with σ shared between both.

        Zeros are in place of what is rounding of the products that are summed, all of it where they cancel.

        >>> values, _ = Factored.of(Update(torch.eye(3)[:2], torch.tensor([[0.0, 2.0], [3.0, 0.0]]))).by_size()
        >>> values.tolist()
        [3.0, 2.0]
        """
        P, values, Q = triplets(self.left, self.right)
        values = values * (values > _DEPENDENT * (self.left.norm(dim=0) @ self.right.norm(dim=0)))
        return values, Factored(self.U, P * values.sqrt(), Q * values.sqrt(), self.V)


def triplets(left: Tensor, right: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """P, σ and Q of a matrix, or of left · rightᵀ, P diag(σ) Qᵀ with the largest first.

    >>> triplets(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [2.0]]))[1].tolist()
    [2.0]
    """
    if right is None or left.shape[1] >= min(len(left), len(right)):
        P, values, Qt = torch.linalg.svd(left if right is None else left @ right.T, full_matrices=False)
        return P, values, Qt.T
    (left, inside), (right, outside) = torch.linalg.qr(left), torch.linalg.qr(right)
    P, values, Qt = torch.linalg.svd(inside @ outside.T)
    return left @ P, values, right @ Qt.T


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


def basis(columns: Tensor) -> tuple[Basis, Tensor]:
    """An orthonormal basis U of the span of some columns, and Uᵀ columns; zeros and what is dependent are left out.

    By eigenvectors of the Gram matrix of the columns at length one, and once more of what those leave, so that a
    direction which is small in every column is found with its digits. Matrix products, on a CPU several times as fast
    as a QR decomposition.

    Args:
        columns: float32 or float64.

    Returns: the basis, and Uᵀ columns in float64.

    >>> columns = torch.eye(5)[:, [0, 1, 1]]
    >>> U, inside = basis(columns * torch.tensor([1.0, 0.125, 3.0]))
    >>> len(inside), inside.abs().sort(0).values.tolist()
    (2, [[0.0, 0.0, 0.0], [1.0, 0.125, 3.0]])
    """
    double = columns.double()
    gram = double.T @ double
    lengths = gram.diagonal().sqrt()
    there = lengths > 0
    if bool(there.all()) and len(lengths):
        values, vectors = torch.linalg.eigh(gram / lengths / lengths[:, None])
        smallest = float(values[0]) / float(values[-1])
        if smallest > (_FLAT if columns.dtype == torch.float64 else _NEAR):  # as many directions as columns
            turn = vectors / values.sqrt() / lengths[:, None]
            return Basis(columns if smallest > _FLAT else double, turn), turn.T @ gram
    U = _basis_of_any(double[:, there] / lengths[there])
    return Basis(U.to(columns.dtype), None), U.T @ double


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
