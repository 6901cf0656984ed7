"""LoraHub: the weights of a sum of task vectors, found without gradients from a few examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from linlora.fusion.arithmetic import task_arithmetic
from linlora.fusion.checks import check_count, check_number, checked
from linlora.fusion.search import bar
from linlora.vectors.task_vector import TaskVector


def lorahub(
    vectors: Iterable[TaskVector],
    objective: Callable[[TaskVector], float],
    budget: int = 40,
    regularization: float = 0.05,
    bound: float = 1.5,
    seed: int = 42,
    progress: bool = True,
) -> TaskVector:
    """Σᵢ wᵢ δᵢ with w = argmin over [−1.5, 1.5]ⁿ of objective(Σᵢ wᵢ δᵢ) + 0.05 · mean |wᵢ| (arXiv 2307.13269).

    Minimised by nevergrad's NGOpt from w = 0, as published. `pip install 'linlora[lorahub]'` brings nevergrad.

    Args:
        objective: what a fused vector costs, to be minimised: the loss of the model, with the vector in it, on the few
            examples of the new task (5 in the paper).
        budget: how often the objective is called; 40 as published.
        regularization: the factor of the L1 term. bound: the largest |wᵢ|.
        seed: of the search; nothing global is seeded.
        progress: show a bar, where stderr is a terminal.

    Holds all vectors, and one more.

    >>> import torch
    >>> v = TaskVector({"q.dB": torch.tensor([1.0, 2.0])}, None, "", {"q": 1.0}, "layer")
    >>> fused = lorahub([v], objective=lambda fused: (fused - 0.8 * v).norm() ** 2)
    >>> bool(abs(fused.norm() / v.norm() - 0.795) < 1e-3)  # 2 · 5 (0.8 - w) = 0.05
    True
    """
    vectors = list(checked(vectors))
    nevergrad = _nevergrad()
    check_number("lorahub", "regularization", regularization)
    check_number("lorahub", "bound", bound)
    check_count("lorahub", "budget", budget)
    if bound <= 0.0:
        raise ValueError(f"lorahub: bound has to be above 0, got {bound}")
    drawn_from = np.random.get_state()  # for a seed that nevergrad then does not need
    space = nevergrad.p.Array(init=[0.0] * len(vectors), lower=[-bound] * len(vectors), upper=[bound] * len(vectors))
    np.random.set_state(drawn_from)
    space.random_state = np.random.RandomState(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
    with warnings.catch_warnings():
        # NGOpt asks COBYLA for steps and numbers of calls that scipy replaces, and says so
        warnings.filterwarnings("ignore", "COBYLA: Invalid", UserWarning)
        costs = []
        for _ in bar(range(budget), "lorahub", progress):
            candidate = optimizer.ask()
            weights = [float(weight) for weight in candidate.value]
            cost = float(objective(task_arithmetic(vectors, weights)))
            costs.append(cost + regularization * float(np.abs(weights).mean()))
            optimizer.tell(candidate, costs[-1])
    if not np.isfinite(costs).any():
        raise ValueError(
            f"lorahub: the objective was never finite in {budget} calls; the vectors or the model diverged"
        )
    return task_arithmetic(vectors, optimizer.provide_recommendation().value)


def _nevergrad() -> Any:
    try:
        import nevergrad
    except ImportError as error:
        raise ImportError("lorahub needs nevergrad, which is not installed: pip install 'linlora[lorahub]'") from error
    return nevergrad
