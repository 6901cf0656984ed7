"""Fits the weights of a new task to a few examples by convex optimization: MHR-z in the tangent space.

Linearized at model scope, the network is affine in the weights of its skills, over all layers and heads at once:

    F(w) = f(φ0) + J w,        column (layer, q, s) of J the derivative along skill s in head q of the layer

J is small: a few examples times a few outputs, by all weights. With own weights for every example, one backward pass
gives the rows of J of one output for all examples, so J takes one forward pass and a backward pass an output. The rest
is a convex problem in memory, with one solution and no learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from linlora.routing.adapters import task_weights
from linlora.routing.model import RoutedModel
from linlora.routing.scope import scope_of
from linlora.routing.selectors import Selector, Table
from linlora.vectors.examples import check_examples, check_labels
from linlora.vectors.products import at_point, main_output


@dataclass(frozen=True)
class RoutingSolution:
    """The result of `fit_routing`.

    Attributes:
        weights: (Q, S) of every selector, by its name.
        loss_before, loss: the mean data loss with uniform weights, and with these.
        passes: backward passes over the data, after one forward pass.
    """

    weights: dict[str, Tensor]
    loss_before: float
    loss: float
    passes: int


def fit_routing(
    model: RoutedModel,
    batches: Sequence[Mapping[str, Any]],
    loss: Literal["squared", "logistic"] = "logistic",
    *,
    simplex: bool = False,
    ridge: float = 1e-4,
) -> RoutingSolution:
    """Find the best weights of all skills for a new task; the model is left unchanged.

    Minimizes 1/n Σᵢ ℓ(Fᵢ(w), yᵢ) + ridge/2 ‖w‖², which is convex: by L-BFGS, or on the simplex (w ≥ 0, Σ_s w_qs = 1 in
    every head) by accelerated projected gradients (FISTA, Beck and Teboulle 2009, restarted where they overshoot).

    Args:
        model: a RoutedModel linearized with `linlora.linearize(model, scope="model")`.
        batches: the task's examples: inputs with "labels", without task_ids.
        loss: "squared", ½ ‖F − y‖² with labels like the main output (examples, ...); or "logistic", the cross entropy
            of an output (examples, classes) with class indices (examples,).
        simplex: whether weights are non-negative and sum to one in every head, as those of Poly do.
        ridge: λ > 0.

    Returns: a RoutingSolution; `add_task(model, solution.weights)` puts it into the model. Takes a forward pass and as
        many backward passes as an example has outputs, and memory for J, examples × outputs × weights float64.

    Raises ValueError for a model of another scope, no batches, batches with task_ids, labels that do not fit.

    >>> import torch, linlora
    >>> base, batch = linlora.testing.tiny_base("bert"), linlora.testing.tiny_batch("bert")
    >>> routed = linlora.routing.route(base, 3, n_skills=4, rank=2, target_modules=["query", "value"])
    >>> for factor in routed.skills():
    ...     _ = torch.nn.init.normal_(factor)
    >>> _ = linlora.linearize(routed, scope="model")
    >>> solution = fit_routing(routed, [{**batch, "labels": torch.tensor([0, 1, 2])}])
    >>> solution.loss < solution.loss_before, add_task(routed, solution.weights)
    (True, 3)
    """
    if scope_of(model) != "model":
        raise ValueError(
            "fit_routing: the network is affine in the weights of its skills at model scope alone: call "
            "linlora.linearize(model, scope='model')"
        )
    check_examples("fit_routing", batches, loss, ridge)
    if any("task_ids" in batch for batch in batches):
        raise ValueError("fit_routing: the batches are of one new task, leave their task_ids out")
    pieces = [_affine(model, {n: x for n, x in batch.items() if n != "labels"}) for batch in batches]
    origin, J = (torch.cat(parts) for parts in zip(*pieces, strict=True))  # (n, outputs), (n, outputs, weights)
    labels = torch.cat([batch["labels"] for batch in batches]).to(origin.device)
    labels = labels.flatten(1) if loss == "squared" else labels
    check_labels("fit_routing", origin, labels, loss)
    if not J.isfinite().all():
        raise ValueError("fit_routing: the derivatives along the skills are not finite")
    shapes = {name: (s.sizes.n_heads, s.sizes.n_skills) for name, s in model.selector_by_name.items()}

    def data_loss(w: Tensor) -> Tensor:
        F = origin + J @ w
        return cross_entropy(F, labels.long()) if loss == "logistic" else 0.5 * (F - labels).square().sum() / len(F)

    start = torch.cat([origin.new_full((heads * skills,), 1.0 / skills) for heads, skills in shapes.values()])
    if simplex:
        curvature = float(torch.linalg.matrix_norm(J.flatten(0, 1), 2)) ** 2 / len(J)
        w = _on_the_simplex(data_loss, start, ridge, list(shapes.values()), curvature + ridge)
    else:
        w = _free(data_loss, start, ridge)
    parts = w.split([heads * skills for heads, skills in shapes.values()])
    weights = {name: part.view(shape).cpu() for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return RoutingSolution(weights, float(data_loss(start)), float(data_loss(w)), passes=J.shape[1])


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
            rows = [*(of_task[layer_of[name]] for of_task in old), weights[name]]
            table.table.copy_(torch.stack([row.to(table.table) for row in rows]))
        table.requires_grad_(any(parameter.requires_grad for parameter in selector.parameters()))
        tables[name] = table
    model.set_selectors(tables)
    return n_tasks


def _affine(model: RoutedModel, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """f(φ0) (n, outputs) and J (n, outputs, weights) of a batch, in float64."""
    own = model.selector_by_name
    main = next(x for x in inputs.values() if isinstance(x, Tensor))
    tables = {name: Table(replace(selector.sizes, n_tasks=len(main))) for name, selector in own.items()}
    try:
        model.set_selectors(dict(tables))
        with at_point(model) as stream, torch.enable_grad(), stream.returning("primal"):
            each = torch.arange(len(main), device=main.device)
            F = main_output(model, {**inputs, "task_ids": each}).flatten(1)
            sums = F.sum(0).unbind()
        leaves = [table.table for table in tables.values()]
        gradients = (torch.autograd.grad(output, leaves, retain_graph=True) for output in sums)
        rows = [torch.cat([gradient.flatten(1) for gradient in of_output], dim=1) for of_output in gradients]
    finally:
        model.set_selectors(own)
    return F.detach().double(), torch.stack(rows, 1).double()


def _free(data_loss: Any, start: Tensor, ridge: float) -> Tensor:
    w = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w], max_iter=1000, history_size=50, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = data_loss(w) + 0.5 * ridge * w.square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    return w.detach()


def _on_the_simplex(
    data_loss: Any, start: Tensor, ridge: float, shapes: list[tuple[int, int]], curvature: float
) -> Tensor:
    """FISTA with the step 1 / curvature, an upper bound of the second derivative, until w stands still."""

    def project(flat: Tensor) -> Tensor:
        parts = flat.split([heads * skills for heads, skills in shapes])
        return torch.cat([project_to_simplex(p.view(shape)).flatten() for p, shape in zip(parts, shapes, strict=True)])

    w, ahead, momentum = start, start, 1.0
    for _ in range(20_000):
        point = ahead.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(data_loss(point) + 0.5 * ridge * point.square().sum(), point)
        candidate = project(ahead - gradient / curvature)
        if (candidate - ahead).norm() <= 1e-10 * candidate.norm():
            return candidate
        if (ahead - candidate) @ (candidate - w) > 0.0:  # the momentum points uphill: start it again
            momentum, ahead = 1.0, candidate
        else:
            grown = 0.5 * (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5)
            ahead, momentum = candidate + (momentum - 1.0) / grown * (candidate - w), grown
        w = candidate
    return w


def project_to_simplex(w: Tensor) -> Tensor:
    """The nearest weights that are non-negative and sum to one over the last dimension (arXiv 1309.1541).

    >>> project_to_simplex(torch.tensor([0.5, 1.0, -1.0])).tolist()
    [0.25, 0.75, 0.0]
    """
    descending = w.sort(-1, descending=True).values
    excess = (descending.cumsum(-1) - 1.0) / torch.arange(1, w.shape[-1] + 1, dtype=w.dtype, device=w.device)
    last = (descending > excess).sum(-1, keepdim=True) - 1
    return (w - excess.gather(-1, last)).clamp(min=0.0)
