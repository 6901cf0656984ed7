"""The problems of routed layers, in the manner of `problem`: a LoRA layer with factors of its own for groups of rows.

Forward and backward are one problem of these factors; each may be absent, which makes the forms:

    shrink S0    (r, K)      d_shrink dS_t   (T, K, r)     wide → rank     forward: A0, A_t     backward: B0ᵀ, B_tᵀ
    expand E0    (N, r)      d_expand dE_t   (T, r, N)     rank → wide     forward: B0, B_t     backward: A0ᵀ, A_tᵀ

    all four                    linearized at (A0, B0)
    d_shrink and d_expand       plain routing
    shrink and d_expand         linearized at B0 = 0; backward it is d_shrink and expand
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import Output, packable
from .problem import Gradients, LoraLinear, Result, check_factors, check_layer, check_products, refuse, shapes


@packable
class GroupedLoraLinear(NamedTuple):
    """One LoRA layer on rows in groups, t the group of a row::

        one stream     u = x' S0ᵀ   c = u + x' dS_t           y   = x Wᵀ + b + s [ c E0ᵀ + (u, without S0: c) dE_t ]
        two streams    u = x' S0ᵀ   c = x' dS_t + x_t' S0ᵀ    y   = x Wᵀ + b + s u E0ᵀ
                                                              y_t = x_t Wᵀ   + s [ c E0ᵀ + u dE_t ]

    x' = mask/(1-p) ⊙ x is x with dropout; in the adjoint x' is x, and the mask lies over the update s [ … ].
    """

    x: Tensor  # (..., K), a matrix (M, K) for a backend
    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)
    shrink: Tensor | None
    expand: Tensor | None
    d_shrink: Tensor | None  # of a layer that mixes itself: the inventory (Q, S, K/Q, r)
    d_expand: Tensor | None  # of a layer that mixes itself: the inventory (Q, S, r, N/Q)
    groups: Any  # Groups of the rows; for a backend what its `group_rows` makes of them
    scaling: float
    x_tangent: Tensor | None = None  # like x; with two streams None is zero
    dropout_p: float = 0.0
    seed: Tensor | None = None  # 0-d int64, of the dropout mask; composed calls also take the mask, (M, K)
    two_streams: bool = False
    masks_update: bool = False  # the side of the mask: of the update in an adjoint, else of the shrink's input
    placed: Tensor | None = None  # x' as the backend's `place` makes it, where it is made already

    @property
    def op(self) -> str:
        """The name that configurations are filed under."""
        return "dual_grouped_lora_linear" if self.two_streams else "grouped_lora_linear"

    @property
    def rank(self) -> int:
        if self.shrink is not None:
            return self.shrink.shape[0]
        assert self.d_shrink is not None
        return self.d_shrink.shape[-1]

    @property
    def at_zero(self) -> bool:
        """Whether the layer is linearized at B0 = 0, where A has no effect."""
        return self.shrink is not None and self.expand is None

    def adjoint(self, g: Tensor, placed: Tensor | None = None) -> GroupedLoraLinear:
        """The problem of the transposes, whose y is the gradient of x of one stream, from the cotangent (M, N)."""
        shrink, expand, d_shrink, d_expand = self[3:7]
        return GroupedLoraLinear(
            g, self.weight.t(), None, _t(expand), _t(shrink), _mt(d_expand), _mt(d_shrink), self.groups, self.scaling,
            None, self.dropout_p, self.seed, False, not self.masks_update, placed,
        )  # fmt: skip

    def primal(self) -> LoraLinear:
        """The primal of two streams: plain LoRA at (A0, B0), which knows of no groups."""
        assert self.shrink is not None
        assert self.expand is not None
        layer = self.x, self.weight, self.bias
        return LoraLinear(*layer, self.shrink, None, None, self.expand, self.scaling, None, self.dropout_p, self.seed)

    def of_one_group(self) -> LoraLinear:
        """The layer of a single group: one adapter, plain LoRA being the short form with A for A0."""
        assert self.d_expand is not None
        A0, A, B = self.shrink, self.d_shrink, self.d_expand[0].t()
        if A0 is None:
            assert A is not None
            A0, A = A[0].t(), None
        layer = self.x, self.weight, self.bias
        dA = None if A is None else A[0].t()
        return LoraLinear(*layer, A0, self.expand, dA, B, self.scaling, None, self.dropout_p, self.seed)

    def outputs(self) -> Result:
        """What a backend returns for matrices: of one stream u and c where a factor makes them, of two u alone."""
        (m, dtype), n = (self.x.shape[0], self.x.dtype), self.weight.shape[0]
        wide, low = Output((m, n), dtype), Output((m, self.rank), dtype)
        if self.two_streams:
            return Result(wide, wide, low)
        return Result(wide, None, low if self.shrink is not None else None, low if self.d_shrink is not None else None)

    def check(self) -> GroupedLoraLinear:
        """Itself, with mixed factors. Raises a ValueError that names the argument, what it is and has to be."""
        op, x, A, B, groups = "grouped_lora_linear", self.x, self.d_shrink, self.d_expand, self.groups
        assert B is not None
        n, k = check_layer(op, self)
        if B.dim() != 3 or (A is not None and A.dim() != 3):
            refuse(op, f"mixed factors A (T, K, r) and B (T, r, N) are expected, got {shapes(A=A, B=B)}")
        rank, count = B.shape[1], groups.n_groups
        if B.shape != (count, rank, n) or (A is not None and A.shape != (count, k, rank)):
            wanted = f"A ({count}, {k}, {rank}) and B ({count}, {rank}, {n})"
            refuse(op, f"{wanted} are expected for {count} groups, got {shapes(A=A, B=B)}")
        if x.shape[:-1].numel() != groups.rows:
            refuse(op, f"the groups are of {groups.rows} rows, x has {x.shape[:-1].numel()}: {shapes(x=x)}")
        if groups.ids.device != x.device:
            refuse(op, f"the groups' ids are on {groups.ids.device}, x on {x.device}: move the task ids")
        return self.check_factors(op)

    def check_factors(self, op: str) -> GroupedLoraLinear:
        """Itself, once its point fits the layer and its factors, mixed already or not, have x's dtype and device."""
        x, weight, _, A0, B0, A, B = self[:7]
        assert B is not None
        if A0 is None and B0 is not None:
            refuse(op, "B0 without A0: a linearization point is A0 and B0, or A0 alone where B0 = 0")
        if A is None and (A0 is None or B0 is not None):
            refuse(op, "A is missing: only a layer linearized at A0 and B0 = 0 does without")
        (n, k), rank = weight.shape, B.shape[-2]
        check_factors(op, x, ("A0", A0, (rank, k)), ("B0", B0, (n, rank)), ("A", A, None), ("B", B, None))
        return self


@packable
class GroupedGradients(NamedTuple):
    """The gradients of every group's factors, d_expand_t = s pᵀ g and d_shrink_t = s x'ᵀ q over the group's rows."""

    p: Tensor | None  # (M, r), with g
    g: Tensor | None  # (M, N), `place`d
    q: Tensor | None  # (M, r), with x
    x: Tensor | None  # x' (M, K), `place`d; where `place` masks nothing yet, x
    groups: Any  # what the backend's `group_rows` made of them
    n_groups: int
    scaling: float
    dtype: torch.dtype  # of the gradients
    dropout_p: float = 0.0
    seed: Tensor | None = None

    @property
    def wide(self) -> Tensor:
        """g, or x where there is no g."""
        wide = self.x if self.g is None else self.g
        assert wide is not None
        return wide

    @property
    def rank(self) -> int:
        low = self.q if self.p is None else self.p
        assert low is not None
        return low.shape[1]

    def outputs(self) -> Gradients:
        """d_expand (T, r, N) and d_shrink (T, K, r); a missing pair gives None."""
        p, g, q, x = self[:4]
        return Gradients(
            None if p is None or g is None else Output((self.n_groups, p.shape[1], g.shape[1]), self.dtype),
            None if q is None or x is None else Output((self.n_groups, x.shape[1], q.shape[1]), self.dtype),
        )

    def check(self) -> GroupedGradients:
        """Itself, `place`d as Triton's kernels place rows. Raises a ValueError for pairs that do not agree."""
        p, g, q, x = self[:4]
        check_products("grouped_gradients", p, g, q, x)
        if p is not None and q is not None and p.shape[1] != q.shape[1]:
            refuse("grouped_gradients", f"p and q are of one rank, got {p.shape[1]} and {q.shape[1]}")
        return self


def _t(factor: Tensor | None) -> Tensor | None:
    return None if factor is None else factor.t()


def _mt(factors: Tensor | None) -> Tensor | None:
    return None if factors is None else factors.mT
