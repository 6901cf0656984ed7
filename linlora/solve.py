"""Fitting a model that is linear in its parameters, by second-order steps on Jacobian products.

With F(δ) = f(φ0) + J δ, the objective

    Φ(δ) = 1/n Σᵢ ℓ(Fᵢ(δ), yᵢ) + λ/2 ‖δ‖²

is convex for squared loss (ℓ = ½ ‖F − y‖²) and for logistic loss (ℓ = −log softmax(F)_y). A Gauss–Newton step s solves

    (Jᵀ H J / n + λ) s = −∇Φ,          H = ∂²ℓ/∂F²          I, or diag(p) − p pᵀ with p = softmax(F)

by conjugate gradient, one dual forward and one backward pass an iteration: what a pass of first-order training costs.
For squared loss one step is the whole problem. Because F is affine, F(δ + t s) = F + t J s comes from what the
iterations computed, and the line search over t costs no pass at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from linlora.products import at_point, both_outputs, displaced, main_output, trainable
from linlora.task_vector import TaskVector, delta_parameters


@dataclass(frozen=True)
class Solution:
    """What `solve` found: the vector, the mean data loss ℓ at the start and after every step, the passes over the data
    (each one forward and one backward)."""

    vector: TaskVector
    losses: tuple[float, ...]
    passes: int


def solve(
    model: PeftModel,
    batches: Sequence[Mapping[str, Any]],
    loss: Literal["squared", "logistic"] = "logistic",
    *,
    ridge: float = 1e-4,
    steps: int = 3,
    iterations: int = 15,
) -> Solution:
    """Fit a model linearized at model scope to data, from where its adapter is now; the model is left unchanged.

    Args:
        model: a PeftModel linearized with scope="model".
        batches: inputs with "labels", gone through several times. For squared loss the labels are floats shaped like
            the main output; for logistic loss class indices (rows,) for an output of (rows, classes).
        loss: "squared" or "logistic".
        ridge: λ > 0 of the objective.
        steps: Gauss–Newton steps; one is enough for squared loss.
        iterations: of conjugate gradient in each step.

    Returns: a Solution; `linlora.apply(model, solution.vector)` puts it into the model. At most
        `steps * (iterations + 1)` passes, fewer where conjugate gradient converges; the outputs of all rows in memory.

    Raises ValueError for a model of another scope, no batches, labels that are missing or do not fit, a ridge that is
        not positive.

    >>> import linlora
    >>> model, batch = linlora.testing.tiny_model("bert"), linlora.testing.tiny_batch("bert")
    >>> _ = linlora.linearize(model, scope="model")
    >>> solution = solve(model, [{**batch, "labels": torch.tensor([0, 1, 2])}])
    >>> solution.losses[-1] < solution.losses[0]
    True
    """
    if ridge <= 0.0:
        raise ValueError(f"solve: ridge is positive, got {ridge}")
    problem = _Problem(model, batches, loss)
    start = TaskVector.from_model(model)
    with at_point(model) as stream, trainable(problem.parameters):
        delta = problem.flat(start.deltas)
        with stream.returning("both"):
            outputs = problem.outputs(delta)
        losses = [problem.loss(outputs)]
        for _ in range(steps):
            with stream.returning("primal"):
                gradient = problem.pull(problem.gradient(outputs)) + ridge * delta
            with stream.returning("both"):
                step, outputs_step = problem.conjugate_gradient(outputs, gradient, ridge, iterations)
            t = _line_search(problem, outputs, outputs_step, delta, step, ridge)
            delta, outputs = delta + t * step, [F + t * dF for F, dF in zip(outputs, outputs_step, strict=True)]
            losses.append(problem.loss(outputs))
    deltas = {name: tensor.cpu() for name, tensor in problem.unflat(delta).items()}
    return Solution(TaskVector(**{**vars(start), "deltas": deltas}), tuple(losses), problem.passes)


class _Problem:
    """The data and the passes over it. Vectors of parameters are flat; of outputs, one tensor a batch."""

    def __init__(self, model: PeftModel, batches: Sequence[Mapping[str, Any]], loss: str) -> None:
        if loss not in ("squared", "logistic"):
            raise ValueError(f"solve: unknown loss {loss!r}; choose 'squared' or 'logistic'")
        if not len(batches) or any("labels" not in batch for batch in batches):
            raise ValueError("solve: batches is a non-empty sequence of inputs that have 'labels'")
        self.model, self.squared = model, loss == "squared"
        self.inputs = [{name: x for name, x in batch.items() if name != "labels"} for batch in batches]
        self.labels: list[Tensor] = [batch["labels"] for batch in batches]
        self.parameters = delta_parameters(model)
        self.rows = sum(labels.shape[0] for labels in self.labels)
        self.passes = 0

    def outputs(self, delta: Tensor) -> list[Tensor]:
        """F(δ) of every batch."""
        with displaced(self.parameters, self.unflat(delta)), torch.no_grad():
            outputs = [torch.add(*both_outputs(self.model, inputs)) for inputs in self.inputs]
        for F, labels in zip(outputs, self.labels, strict=True):
            expected = F.shape if self.squared else F.shape[:1]
            if labels.shape != expected or labels.is_floating_point() != self.squared:
                raise ValueError(
                    f"solve: labels of {'floats' if self.squared else 'class indices'} {tuple(expected)} are expected "
                    f"for outputs {tuple(F.shape)}, got {labels.dtype} {tuple(labels.shape)}"
                )
        return outputs

    def loss(self, outputs: Sequence[Tensor]) -> float:
        """1/n Σ ℓ(F, y)."""
        total = 0.0
        for F, y in zip(outputs, self.labels, strict=True):
            total += float(0.5 * (F - y).square().sum() if self.squared else cross_entropy(F, y, reduction="sum"))
        return total / self.rows

    def gradient(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """∂ℓ/∂F / n of every batch."""
        return [
            (F - y if self.squared else F.softmax(-1) - one_hot(y, F.shape[-1])) / self.rows
            for F, y in zip(outputs, self.labels, strict=True)
        ]

    def curvature(self, F: Tensor, dF: Tensor) -> Tensor:
        """H dF / n."""
        if self.squared:
            return dF / self.rows
        p = F.softmax(-1)
        return (p * dF - p * (p * dF).sum(-1, keepdim=True)) / self.rows

    def pull(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Jᵀ g: a forward pass of the primal and its backward."""
        return self._accumulate(lambda i: (main_output(self.model, self.inputs[i]), cotangents[i]))

    def product(self, outputs: Sequence[Tensor], v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(Jᵀ H J v / n, J v): a dual forward pass and the backward of its primal."""
        directions = []

        def at(i: int) -> tuple[Tensor, Tensor]:
            f, dF = both_outputs(self.model, self.inputs[i])
            directions.append(dF)
            return f, self.curvature(outputs[i], dF)

        with displaced(self.parameters, self.unflat(v)):
            return self._accumulate(at), directions

    def conjugate_gradient(
        self, outputs: Sequence[Tensor], gradient: Tensor, ridge: float, iterations: int
    ) -> tuple[Tensor, list[Tensor]]:
        """(s, J s) after some iterations of conjugate gradient on (Jᵀ H J / n + λ) s = −gradient."""
        step, outputs_step = torch.zeros_like(gradient), [torch.zeros_like(F) for F in outputs]
        residual = direction = -gradient
        square = residual @ residual
        solved = square * torch.finfo(square.dtype).eps ** 2  # what is left below it is rounding
        for _ in range(iterations):
            if square <= solved:
                break
            curved, dF = self.product(outputs, direction)
            curved = curved + ridge * direction
            rate = square / (direction @ curved)
            step = step + rate * direction
            outputs_step = [a + rate * b for a, b in zip(outputs_step, dF, strict=True)]
            residual = residual - rate * curved
            previous, square = square, residual @ residual
            direction = residual + square / previous * direction
        return step, outputs_step

    def flat(self, deltas: Mapping[str, Tensor]) -> Tensor:
        device = next(iter(self.parameters.values())).device
        return torch.cat([deltas[name].to(device).flatten() for name in self.parameters])

    def unflat(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([parameter.numel() for parameter in self.parameters.values()])
        return {n: piece.view_as(p) for (n, p), piece in zip(self.parameters.items(), pieces, strict=True)}

    def _accumulate(self, forward: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
        """Σ Jᵀ g over the batches, with forward(i) = (f, g)."""
        leaves = list(self.parameters.values())
        total: Any = 0.0
        self.passes += 1
        with torch.enable_grad():
            for i in range(len(self.inputs)):
                f, g = forward(i)
                gradients = torch.autograd.grad(f, leaves, g, allow_unused=True, materialize_grads=True)
                total = total + torch.cat([gradient.flatten() for gradient in gradients])
        return total


def _line_search(
    problem: _Problem, outputs: list[Tensor], outputs_step: list[Tensor], delta: Tensor, step: Tensor, ridge: float
) -> float:
    """The largest t of 1, ½, ¼, ... that lowers the objective; 0 when none of them does."""

    def objective(t: float) -> float:
        moved = [F + t * dF for F, dF in zip(outputs, outputs_step, strict=True)]
        return problem.loss(moved) + 0.5 * ridge * float((delta + t * step).square().sum())

    now = objective(0.0)
    return next((t for t in (0.5**k for k in range(12)) if objective(t) < now), 0.0)
