"""Every number of the routing quickstart in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

from linlora.quickstart.digits import Digits
from linlora.quickstart.routing.tasks import DOMAINS, QUESTIONS


@dataclass(frozen=True)
class RoutingSettings:
    """What a run directory is made with."""

    # the backbone and its pre-training
    data: Digits = field(default_factory=Digits)
    threads: int = 1

    domains: tuple[str, ...] = tuple(DOMAINS)
    questions: tuple[str, ...] = tuple(QUESTIONS)

    # the inventories, trained on batches of mixed tasks; every adapter has their rank
    skills: int = 8
    heads: int = 4
    rank: int = 4
    alpha: int = 8
    steps: int = 600
    batch: int = 64
    learning_rate: float = 5e-3
    logits_learning_rate: float = 5e-2  # ten times that of the skills, as in the paper's code
    weight_decay: float = 0.01

    # adaptation to a held-out task: as many labelled images, as many steps for every method that takes steps
    shots: tuple[int, ...] = (16, 64)
    adaptation_steps: int = 50
    adaptation_batch: int = 32

    # the convex fit of weights at model scope
    ridge: float = 1e-3
