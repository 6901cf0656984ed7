"""KnOTS-TIES: TIES on the coordinates of every ΔW = s B A in the left singular vectors of all of them.

TIES on the values of ΔW makes a matrix of full rank, and gives another result in every other basis. This basis is a
function of the ΔW: neither the order of the adapters matters nor how their size is shared between A and B, nor the
signs of singular vectors, since a sum of zero gives zero. K×K and N×K matrices are not formed, nor is a basis of the A:

    [ΔW₁ … ΔW_T] = U Σ [V₁ᵀ … V_Tᵀ] = [B₁ R₁ᵀ … B_T R_Tᵀ] · an orthonormal matrix        Aₜᵀ = Qₜ Rₜ
    Σ Vₜᵀ = (Uᵀ Bₜ) Aₜ                                                                     (p, rₜ) times (rₜ, K)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from linlora.fusion.checks import check_number
from linlora.fusion.core_space import support, tolerance
from linlora.fusion.layerwise import Layer, fused_layers, layer, side_by_side, weight_vectors
from linlora.fusion.quantiles import cut_below
from linlora.fusion.sides import Sides, check_keep
from linlora.fusion.truncation import Basis, OutRank, basis
from linlora.layers.weights import Update
from linlora.vectors.task_vector import TaskVector

PUBLISHED_KEEP, PUBLISHED_SCALING = 0.2, 0.6
_ROUNDING = 1e-12
_COLUMNS = 256
"""Coordinates are made and used in blocks of so many columns, which stay in the cache."""


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
    frames: dict[str, Frame] = {}  # of each layer, from the first pass on

    def pieces(name: str) -> Iterator[dict[int, Tensor]]:
        of = layer(in_weights, name)
        if name not in frames:
            frames[name] = Frame.of(of)
        for block in coordinates(of, frames[name].parts):
            yield {i: values.float().flatten() for i, values in zip(of.indices, block, strict=True)}

    names = sorted({name for vector in in_weights for name in vector.scalings})
    cuts = cut_below(names, pieces, len(in_weights), keep)

    def merge(of: Layer) -> Update:
        blocks = []
        for block in coordinates(of, frames[of.name].parts):
            kept = (hardshrink(values, cuts[i]) for i, values in zip(of.indices, block, strict=True))
            blocks.append(Sides.of(kept).mean(rounding=_ROUNDING))
        return Update(scaling * torch.cat(blocks, 1), frames[of.name].vectors(of))

    return fused_layers(in_weights, merge, out_rank, energy)


class Frame(NamedTuple):
    """The left singular vectors U (N, p) of [ΔW₁ … ΔW_T] in few numbers: U = [B₁ … B_T] · turn, or basis · turn.

    `of_columns` is the dtype in which the first holds, None for the second; `parts` are Uᵀ Bₜ (p, rₜ), float64, with
    rows that are rounding exactly zero.
    """

    turn: Tensor
    of_columns: torch.dtype | None
    parts: list[Tensor]

    @classmethod
    def of(cls, layer: Layer) -> Frame:
        """The frame of a layer.

        >>> one = Update(torch.eye(2), 3.0 * torch.eye(2))
        >>> layer = Layer("q", [0, 1], [one, Update(one.A, 0.0 * one.B)])
        >>> frame = Frame.of(layer)
        >>> (frame.vectors(layer).double() @ frame.parts[0]).tolist(), frame.parts[1].any().item()
        ([[3.0, 0.0], [0.0, 3.0]], False)
        """
        U, inside = basis(side_by_side(layer).B)
        inner = inside.split([len(update.A) for update in layer.updates], 1)
        Rs = [basis(update.A.T)[1] for update in layer.updates]
        P, _, _ = support(torch.cat([part @ R.T for part, R in zip(inner, Rs, strict=True)], 1), None, tolerance(layer))
        parts = []
        for part, R in zip(inner, Rs, strict=True):
            rotated = P.T @ part
            lengths = (rotated @ R.T).norm(dim=1, keepdim=True)
            parts.append(rotated * (lengths > _ROUNDING * lengths.norm()))
        return cls(P, None, parts) if U.turn is None else cls(U.turn @ P, U.columns.dtype, parts)

    def vectors(self, layer: Layer) -> Tensor:
        """U, in the dtype of the factors or wider."""
        columns = side_by_side(layer).B
        U = basis(columns)[0] if self.of_columns is None else Basis(columns.to(self.of_columns), None)
        return U.times(self.turn)


def coordinates(of: Layer, parts: list[Tensor]) -> Iterator[list[Tensor]]:
    """Σ Vₜᵀ of every task, in blocks of columns."""
    for start in range(0, of.updates[0].A.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        yield [part @ update.A[:, columns].double() for part, update in zip(parts, of.updates, strict=True)]
