"""Selectors: they give every row of a batch the weights (Q, S) that mix the skills of a layer.

Those here weight a row by its task, or all rows alike, so the factors of a task are mixed once for all its rows and all
layers; `linlora.routing.gate` weights by the input.

    variant      weights of task t                                          trains
    poly         σ(Z_t) / Σ_s σ(Z_t), Q heads (arXiv 2202.13914, 2211.03831)   Z
    table        the numbers themselves                                     the numbers
    private      one skill a task                                           –
    uniform      1 / S                                                      –
    adamix       a random skill in training, 1 / S afterwards (2205.12410)  –
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli
from torch.nn.functional import dropout, normalize, one_hot

from linlora.routing.inventory import in_words

EPS = 1e-12


@dataclass(frozen=True)
class Sizes:
    """The sizes of a selector: T tasks, S skills in Q heads, on layers with `in_features` inputs."""

    n_tasks: int
    n_skills: int
    n_heads: int
    in_features: int


class Selector(nn.Module):
    """Weights by row. A subclass has a `variant`, the name it is saved under, and implements `weights`.

    Attributes:
        reads: what decides the weights. "task": the row's; "nothing": all rows have the same; "input": the layer's.
        sizes: the Sizes it was made for.
        options: its other constructor arguments, to make it again when a model is loaded.
    """

    variant: ClassVar[str]
    reads: ClassVar[Literal["task", "nothing", "input"]] = "task"
    unit: Tensor

    def __init__(self, sizes: Sizes, **options: Any) -> None:
        super().__init__()
        self.sizes, self.options = sizes, options
        self.register_buffer("unit", torch.ones(()), persistent=False)  # of the dtype and on the device of the weights

    @property
    def samples(self) -> bool:
        """Whether two examples of one task may get different weights now, as noise in training does."""
        return False

    def weights(self, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The weights of some rows, by what decides them (`reads`).

        "task"       of the tasks (R,) of R rows: (R, Q, S)
        "nothing"    likewise, or a pair of them, for A and for B
        "input"      of the input (..., K): (examples, Q, S), or (examples, length, Q, S) for every token
        """
        raise NotImplementedError

    @property
    def apart(self) -> bool:
        """Whether the skills are adapters of no common start, whose factors do not add; `side_by_side` mixes them."""
        return bool(self.options.get("apart"))

    def description(self) -> dict[str, Any]:
        """The selector as JSON, from which `make_selector` makes it again."""
        return {"variant": self.variant, "sizes": asdict(self.sizes), "options": self.options}

    def extra_repr(self) -> str:
        sizes = in_words(self.sizes.n_skills, self.sizes.n_heads)
        if self.reads == "task":
            sizes = f"{self.sizes.n_tasks} tasks, {sizes}"
        return ", ".join([sizes, *(f"{name}={value}" for name, value in self.options.items() if value)])


class Poly(Selector):
    """Learned logits Z (T, Q S) for every task: Poly with one head, multi-head routing (MHR) with more::

        p = σ(Z_t)      w_qs = p_qs / (Σ_s p_qs + 1e-12)

    Args:
        sizes: T, S and Q.
        sampling: in place of p, "relaxed_bernoulli" takes a sample of RelaxedBernoulli(temperature 1, logits Z_t) for
            every example in training; "straight_through" takes round(p), with the gradient of p, in training and after.
        l2_norm: w = Z_t / ‖Z_t‖ a head instead. Excludes the other options.
        shared_skill: p = 1 for the last skill, whatever the task.
        logit_dropout: dropout of p, in training.
        old_tasks: the first tasks, whose logits do not train (`linlora.routing.mhr_z`).

    >>> import torch
    >>> poly = Poly(Sizes(n_tasks=5, n_skills=4, n_heads=2, in_features=8))
    >>> poly.weights(torch.tensor([3, 0])).sum(-1).detach().round(decimals=4).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """

    variant = "poly"
    old_logits: Tensor | None

    def __init__(
        self,
        sizes: Sizes,
        sampling: str | None = None,
        l2_norm: bool = False,
        shared_skill: bool = False,
        logit_dropout: float = 0.0,
        old_tasks: int = 0,
    ) -> None:
        if sampling not in (None, "relaxed_bernoulli", "straight_through"):
            raise ValueError(f"unknown sampling {sampling!r}: choose 'relaxed_bernoulli', 'straight_through' or None")
        if not 0.0 <= logit_dropout < 1.0:
            raise ValueError(f"logit_dropout is a probability below 1, got {logit_dropout}")
        if l2_norm and (sampling or shared_skill or logit_dropout):
            raise ValueError("l2_norm normalises the logits themselves; sampling, shared_skill and dropout are of σ(Z)")
        super().__init__(
            sizes, sampling=sampling, l2_norm=l2_norm, shared_skill=shared_skill, logit_dropout=logit_dropout,
            old_tasks=old_tasks,
        )  # fmt: skip
        self.sampling, self.l2_norm, self.shared_skill = sampling, l2_norm, shared_skill
        self.logit_dropout = logit_dropout
        self.logits = nn.Parameter(_fresh_logits(sizes.n_tasks - old_tasks, sizes))
        self.register_buffer("old_logits", _fresh_logits(old_tasks, sizes) if old_tasks else None)

    @property
    def samples(self) -> bool:
        return self.training and (self.sampling == "relaxed_bernoulli" or self.logit_dropout > 0.0)

    def weights(self, rows: Tensor) -> Tensor:
        logits = self._all_logits()[rows].unflatten(1, (self.sizes.n_heads, self.sizes.n_skills))
        if self.l2_norm:
            return normalize(logits, dim=-1)
        p = self._probabilities(logits)
        if self.logit_dropout > 0.0:
            p = dropout(p, self.logit_dropout, self.training)
        if self.shared_skill:
            p = torch.cat([p[..., :-1], torch.ones_like(p[..., -1:])], -1)
        return p / (p.sum(-1, keepdim=True) + EPS)

    def add_tasks(self, n_tasks: int) -> None:
        """Freeze the logits of all tasks so far and append fresh ones, which train, for `n_tasks` more."""
        old = self._all_logits().detach()
        self.old_logits = old
        self.logits = nn.Parameter(_fresh_logits(n_tasks, self.sizes).to(old))
        self.sizes = replace(self.sizes, n_tasks=len(old) + n_tasks)
        self.options = {**self.options, "old_tasks": len(old)}

    def _all_logits(self) -> Tensor:
        return self.logits if self.old_logits is None else torch.cat([self.old_logits, self.logits])

    def _probabilities(self, logits: Tensor) -> Tensor:
        if self.sampling == "relaxed_bernoulli" and self.training:
            return RelaxedBernoulli(self.unit, logits=logits).rsample()
        p = torch.sigmoid(logits)
        return p + (p.round() - p).detach() if self.sampling == "straight_through" else p


class Table(Selector):
    """The weights themselves, (T, Q, S), as one parameter; uniform at first. `fit_routing` writes them.

    >>> import torch
    >>> Table(Sizes(n_tasks=5, n_skills=4, n_heads=1, in_features=8)).weights(torch.tensor([3])).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
    """

    variant = "table"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.table = nn.Parameter(torch.full((sizes.n_tasks, sizes.n_heads, sizes.n_skills), 1.0 / sizes.n_skills))

    def weights(self, rows: Tensor) -> Tensor:
        return self.table[rows]


class Private(Selector):
    """Skill t for task t alone; S = T.

    Args:
        sizes: T = S and Q.
        apart: the skills are adapters trained apart, in one head. A mixture adds their updates, not their factors
            (`linlora.routing.side_by_side`).

    >>> import torch
    >>> Private(Sizes(n_tasks=3, n_skills=3, n_heads=1, in_features=8)).weights(torch.tensor([2])).tolist()
    [[[0.0, 0.0, 1.0]]]
    """

    variant = "private"

    def __init__(self, sizes: Sizes, apart: bool = False) -> None:
        if sizes.n_skills != sizes.n_tasks:
            raise ValueError(f"private routing has a skill a task, got {sizes.n_skills} skills, {sizes.n_tasks} tasks")
        if apart and sizes.n_heads > 1:
            raise ValueError(f"adapters trained apart (apart=True) are skills in one head, got {sizes.n_heads} heads")
        super().__init__(sizes, **({"apart": True} if apart else {}))

    def weights(self, rows: Tensor) -> Tensor:
        return one_hot(rows, self.sizes.n_skills).to(self.unit).unsqueeze(1).expand(-1, self.sizes.n_heads, -1)


class Uniform(Selector):
    """The mean of all skills for every row: MHR-μ; with one skill, the adapter that all tasks share.

    >>> import torch
    >>> Uniform(Sizes(n_tasks=1, n_skills=4, n_heads=1, in_features=8)).weights(torch.tensor([0])).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
    """

    variant = "uniform"
    reads = "nothing"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)

    def weights(self, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (self.unit / self.sizes.n_skills).expand(len(rows), self.sizes.n_heads, self.sizes.n_skills)


class AdaMix(Uniform):
    """In training a random skill for A and another for B in every layer and step, for all rows alike; the mean after.

    AdaMix (arXiv 2205.12410) with low-rank experts: i, j ~ U{1 … S}, y = x Wᵀ + s (x A_i) B_j; in use, the averages of
    A and of B. Its consistency loss, a symmetric KL between two passes, belongs to the training loop.

    >>> import torch
    >>> adamix = AdaMix(Sizes(n_tasks=1, n_skills=4, n_heads=1, in_features=8))
    >>> for_A, for_B = adamix.weights(torch.tensor([0]))
    >>> sorted(for_A.flatten().tolist()), adamix.eval().weights(torch.tensor([0])).flatten().tolist()
    ([0.0, 0.0, 0.0, 1.0], [0.25, 0.25, 0.25, 0.25])
    """

    variant = "adamix"

    def weights(self, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self.training:
            return super().weights(rows)
        chosen = torch.randint(self.sizes.n_skills, (2,), device=rows.device)
        for_A, for_B = one_hot(chosen, self.sizes.n_skills).to(self.unit)
        shape = (len(rows), self.sizes.n_heads, self.sizes.n_skills)
        return for_A.expand(shape), for_B.expand(shape)


def _fresh_logits(n_tasks: int, sizes: Sizes) -> Tensor:
    return torch.empty(n_tasks, sizes.n_heads * sizes.n_skills).uniform_(-1e-3, 1e-3)
