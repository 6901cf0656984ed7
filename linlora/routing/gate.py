"""Gates: selectors that read a layer's input, so that every example mixes the skills in its own way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linlora.routing.selectors import Selector, Sizes


class Gate(Selector):
    """A small network that weights the skills of an example by the mean h of the layer's input over its tokens.

    WEMoE (arXiv 2402.00433) over low-rank task vectors τ_s: W(x) = W0 + Σ_s λ_s τ_s with

        λ = b                       hidden = None: one λ a skill, whatever the input
        λ = b + V h                 hidden = 0
        λ = b + V ReLU(U h + c)     hidden > 0

    h is over the tokens the layer sees: padding counts, and a step of cached generation sees the last one alone. At
    first b is `start` (0.3 in the paper) and V zero, so that training begins at task arithmetic.

    >>> import torch
    >>> gate = Gate(Sizes(n_tasks=0, n_skills=2, n_heads=1, in_features=8), hidden=4)
    >>> [round(weight, 4) for weight in gate.weights(torch.randn(3, 5, 8))[0].flatten().tolist()]
    [0.3, 0.3]
    """

    variant = "gate"
    reads = "input"

    def __init__(self, sizes: Sizes, hidden: int | None = 0, start: float = 0.3) -> None:
        super().__init__(sizes, hidden=hidden, start=start)
        inputs, outputs = sizes.in_features, sizes.n_heads * sizes.n_skills
        self.start = nn.Parameter(torch.full((outputs,), float(start)))
        self.network: nn.Module | None = None
        if hidden is not None:
            last = nn.Linear(hidden or inputs, outputs, bias=False)
            nn.init.zeros_(last.weight)
            self.network = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), last) if hidden else last

    def weights(self, rows: Tensor) -> Tensor:
        h = rows.flatten(1, -2).mean(1) if rows.dim() > 2 else rows
        weights = self.start.expand(h.shape[0], -1)
        if self.network is not None:
            weights = weights + self.network(h.to(self.start.dtype))
        return weights.unflatten(1, (self.sizes.n_heads, self.sizes.n_skills))
