"""Few-shot weights for a new task by convex optimization: MHR-z in the tangent space.

Linearized at model scope, the network is affine in the weights of its skills, F(w) = f(φ0) + J Σ_s w_s δ_s, over all
layers and heads at once. So a convex loss is convex in w: there is one best set of weights and no learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from linlora.products import at_point, trainable
from linlora.routing.adapters import task_weights
from linlora.routing.model import RoutedModel
from linlora.routing.scope import scope_of
from linlora.routing.selectors import Selector, Table
from linlora.solve import Problem


@dataclass(frozen=True)
class RoutingSolution:
    """What `fit_routing` found: the weights (Q, S) of every selector, by its name; the mean data losses at the start
    and after every step; the passes over the data, each one forward and one backward."""

    weights: dict[str, Tensor]
    losses: tuple[float, ...]
    passes: int


def fit_routing(
    model: RoutedModel,
    batches: Sequence[Mapping[str, Any]],
    loss: Literal["squared", "logistic"] = "logistic",
    *,
    simplex: bool = False,
    ridge: float = 1e-4,
    steps: int | None = None,
    iterations: int = 15,
) -> RoutingSolution:
    """Fit the weights of a new task on all skills, from uniform ones; the model is left unchanged.

    Minimizes 1/n Σᵢ ℓ(Fᵢ(w), yᵢ) + ridge/2 ‖w‖², which is convex, by Gauss–Newton with conjugate gradient; on the
    simplex (w ≥ 0, Σ_s w_qs = 1 in every head) by accelerated projected gradients (FISTA, Beck and
    Teboulle 2009, restarted where it overshoots), whose step is searched for.

    Args:
        model: a RoutedModel linearized with `linlora.linearize(model, scope="model")`.
        batches: inputs with "labels" and no task_ids, gone through several times; as of `linlora.functional.solve`.
        loss: "squared" or "logistic".
        simplex: whether weights are non-negative and sum to one in every head, as those of Poly do.
        ridge: λ > 0.
        steps: Gauss–Newton steps (3 if not given), or steps of the projected gradient (60).
        iterations: of conjugate gradient in each Gauss–Newton step.

    Returns: a RoutingSolution; `add_task(model, solution.weights)` puts it into the model.

    Raises ValueError for a model of another scope, no batches, batches with task_ids, labels that do not fit.

    >>> import torch, linlora
    >>> base, batch = linlora.testing.tiny_base("bert"), linlora.testing.tiny_batch("bert")
    >>> routed = linlora.routing.route(base, 3, n_skills=4, rank=2, target_modules=["query", "value"])
    >>> for factor in routed.skills():
    ...     _ = torch.nn.init.normal_(factor)
    >>> _ = linlora.linearize(routed, scope="model")
    >>> solution = fit_routing(routed, [{**batch, "labels": torch.tensor([0, 1, 2])}])
    >>> solution.losses[-1] < solution.losses[0], add_task(routed, solution.weights)
    (True, 3)
    """
    if scope_of(model) != "model":
        raise ValueError(
            "fit_routing: the network is affine in the weights of its skills at model scope alone: call "
            "linlora.linearize(model, scope='model')"
        )
    if any("task_ids" in batch for batch in batches):
        raise ValueError("fit_routing: the batches are of one new task, leave their task_ids out")
    own = model.selector_by_name
    tables = {name: Table(replace(selector.sizes, n_tasks=1)) for name, selector in own.items()}
    model.set_selectors(tables)
    try:
        examples = [{**batch, "task_ids": torch.zeros(len(batch["labels"]), dtype=torch.int64)} for batch in batches]
        problem = Problem(model, examples, loss, {name: table.table for name, table in tables.items()})
        start = problem.flat({name: table.table.detach() for name, table in tables.items()})
        if simplex:
            weights, losses, passes = _on_the_simplex(problem, start, ridge, steps or 60)
        else:
            weights, losses = problem.gauss_newton(start, ridge, steps or 3, iterations)
            passes = (steps or 3) * (iterations + 1)
    finally:
        model.set_selectors(own)
    return RoutingSolution({n: w[0].cpu() for n, w in problem.unflat(weights).items()}, losses, passes)


def add_task(model: RoutedModel, weights: Mapping[str, Tensor]) -> int:
    """Give a new task weights of its own, (Q, S) by the name of every selector, and return its id.

    In place; the selectors become tables, in which the tasks so far keep the weights they have in use.

    Raises ValueError for weights of other selectors or shapes.
    """
    n_tasks = model.n_tasks
    old = [task_weights(model, task) for task in range(n_tasks)]
    layer_of = {inventory.selector: name for name, inventory in model.inventories.items()}
    tables: dict[str, Selector] = {}
    for name, selector in model.selector_by_name.items():
        shape = (selector.sizes.n_heads, selector.sizes.n_skills)
        if name not in weights or tuple(weights[name].shape) != shape:
            got = tuple(weights[name].shape) if name in weights else "none"
            raise ValueError(f"add_task: weights {shape} for the selector '{name}' are expected, got {got}")
        table = Table(replace(selector.sizes, n_tasks=n_tasks + 1)).to(selector.unit)
        with torch.no_grad():
            rows = [of_task[layer_of[name]] for of_task in old]
            table.table.copy_(torch.stack([*(row.to(table.table) for row in rows), weights[name].to(table.table)]))
        table.requires_grad_(any(parameter.requires_grad for parameter in selector.parameters()))
        tables[name] = table
    model.set_selectors(tables)
    return n_tasks


def _on_the_simplex(problem: Problem, start: Tensor, ridge: float, steps: int) -> tuple[Tensor, tuple[float, ...], int]:
    """FISTA from `start`. The outputs at the extrapolated point follow from those at the last two, F being affine."""

    def project(flat: Tensor) -> Tensor:
        return problem.flat({name: project_to_simplex(w) for name, w in problem.unflat(flat).items()})

    def objective(outputs: list[Tensor], w: Tensor) -> float:
        return problem.loss(outputs) + 0.5 * ridge * float(w.square().sum())

    passes, rate, momentum = 1, 1.0, 1.0
    with at_point(problem.model) as stream, trainable(problem.parameters):
        with stream.returning("both"):
            outputs = problem.outputs(start)
        w = ahead = start
        outputs_ahead = outputs
        losses = [problem.loss(outputs)]
        for _ in range(steps):
            with stream.returning("primal"):
                gradient = problem.pull(problem.gradient(outputs_ahead)) + ridge * ahead
            now = objective(outputs_ahead, ahead)
            rate *= 1.5
            while True:
                candidate = project(ahead - rate * gradient)
                step = candidate - ahead
                with stream.returning("both"):
                    outputs_candidate = problem.outputs(candidate)
                passes += 1
                bound = now + float(gradient @ step) + float(step @ step) / (2.0 * rate)
                if objective(outputs_candidate, candidate) <= bound + 1e-12 * abs(now) or rate < 1e-12:
                    break
                rate *= 0.5
            grown = 0.5 * (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5)
            if objective(outputs_candidate, candidate) > objective(outputs, w):
                momentum, ahead, outputs_ahead = 1.0, w, outputs  # the momentum went too far: start again from here
                continue
            beta = (momentum - 1.0) / grown
            ahead = candidate + beta * (candidate - w)
            outputs_ahead = [F + beta * (F - G) for F, G in zip(outputs_candidate, outputs, strict=True)]
            w, outputs, momentum = candidate, outputs_candidate, grown
            losses.append(problem.loss(outputs))
    return w, tuple(losses), passes


def project_to_simplex(w: Tensor) -> Tensor:
    """The nearest weights that are non-negative and sum to one over the last dimension (arXiv 1309.1541).

    >>> project_to_simplex(torch.tensor([0.5, 1.0, -1.0])).tolist()
    [0.25, 0.75, 0.0]
    """
    descending = w.sort(-1, descending=True).values
    excess = (descending.cumsum(-1) - 1.0) / torch.arange(1, w.shape[-1] + 1, dtype=w.dtype, device=w.device)
    last = (descending > excess).sum(-1, keepdim=True) - 1
    return (w - excess.gather(-1, last)).clamp(min=0.0)
