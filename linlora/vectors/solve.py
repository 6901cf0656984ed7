"""Fits a model that is linear in its parameters, by Gauss–Newton steps on Jacobian products.

With F(δ) = f(φ0) + J δ, the objective

    Φ(δ) = 1/n Σᵢ ℓ(Fᵢ(δ), yᵢ) + λ/2 ‖δ‖²

is convex for squared loss (ℓ = ½ ‖F − y‖²) and for logistic loss (ℓ = −log softmax(F)_y). A step begins with the
gradient of Φ and goes on with its products with the curvature, as conjugate gradient does:

    q₁ = ∇Φ,  qₖ₊₁ = Jᵀ H J qₖ,          H = ∂²ℓ/∂F²          I, or diag(p) − p pᵀ with p = softmax(F)

One product is one dual forward and one backward pass, the cost of a pass of first-order training, and gives J qₖ too.
F is affine: with J q known, Φ is known on the span of all directions found so far, and a step ends at its exact minimum
there, at no further pass. The directions are kept, orthonormal, from step to step. Conjugate gradient keeps none: it
loses them to rounding, and each step starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from linlora.layers.temporary import displaced, trainable
from linlora.vectors.adapters import delta_parameters
from linlora.vectors.examples import check_examples, check_labels
from linlora.vectors.products import at_point, both_outputs, main_output
from linlora.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class Solution:
    """The result of `solve`.

    Attributes:
        losses: the mean data loss ℓ at the start and after every step.
        passes: over the data, each one forward and one backward.
    """

    vector: TaskVector
    losses: tuple[float, ...]
    passes: int


def solve(
    model: PeftModel,
    batches: Iterable[Mapping[str, Any]],
    loss: Literal["squared", "logistic"] = "logistic",
    *,
    ridge: float = 1e-4,
    steps: int = 6,
    iterations: int = 7,
) -> Solution:
    """Fit a model linearized at model scope to data, from where its adapter is now; the model is left unchanged.

    Args:
        model: a PeftModel linearized with scope="model".
        batches: inputs with "labels", kept in memory and gone through several times. For squared loss the labels are
            floats shaped like the main output; for logistic loss class indices (rows,) of an output (rows, classes).
        loss: "squared" or "logistic".
        ridge: λ > 0 of the objective.
        steps: gradients taken; one is enough for squared loss.
        iterations: directions that follow from each of them.

    Returns: a Solution; `linlora.apply(model, solution.vector)` puts it into the model. At most
        `steps * (iterations + 1)` passes, fewer where a step has no direction left; in memory are the outputs of all
        rows and `steps * iterations` directions, each as large as the adapter and those outputs.

    Raises ValueError for a model of another scope, no batches, labels that are missing or do not fit, outputs that are
        not finite, a ridge that is not positive.

    >>> import linlora
    >>> model, batch = linlora.testing.tiny_model("bert"), linlora.testing.tiny_batch("bert")
    >>> _ = linlora.linearize(model, scope="model")
    >>> solution = solve(model, [{**batch, "labels": torch.tensor([0, 1, 2])}])
    >>> solution.losses[-1] < solution.losses[0]
    True
    """
    batches = list(batches)  # once: a loader that shuffles gives other rows the next time
    check_examples("solve", batches, loss, ridge)
    problem = _Problem(model, batches, loss)
    start = TaskVector.from_model(model)
    with at_point(model) as stream, trainable(problem.parameters):
        delta = problem.flat(start.deltas)
        with stream.returning("both"):
            outputs = problem.outputs(delta)
        losses = [problem.loss(outputs)]
        span = _Span(problem, delta, outputs, ridge)
        for _ in range(steps):
            with stream.returning("primal"):
                direction = problem.pull(problem.gradient(outputs)) + ridge * delta
            found = len(span.basis)
            with stream.returning("both"):
                for _ in range(iterations):
                    q = span.new(direction)
                    if q is None:
                        break
                    direction, image = problem.product(outputs, q)
                    span.add(q, image)
            if len(span.basis) == found:
                break
            delta, outputs = span.minimum()
            losses.append(problem.loss(outputs))
    deltas = {name: tensor.cpu() for name, tensor in problem.unflat(delta).items()}
    return Solution(replace(start, deltas=deltas), tuple(losses), problem.passes)


class _Problem:
    """The data and the passes over it. Vectors of parameters are flat, vectors of outputs one tensor a batch."""

    def __init__(self, model: PeftModel, batches: Sequence[Mapping[str, Any]], loss: str) -> None:
        self.model, self.loss_name, self.squared = model, loss, loss == "squared"
        self.inputs = [{name: x for name, x in batch.items() if name != "labels"} for batch in batches]
        self.labels: list[Tensor] = [batch["labels"] for batch in batches]
        self.parameters = delta_parameters(model)
        self.rows = sum(labels.shape[0] for labels in self.labels)
        self.passes = 0

    def outputs(self, delta: Tensor) -> list[Tensor]:
        """F(δ) of every batch, in float64 as everything that is summed over directions."""
        with displaced(self.parameters, self.unflat(delta)), torch.no_grad():
            outputs = [torch.add(*both_outputs(self.model, inputs)).double() for inputs in self.inputs]
        for F, labels in zip(outputs, self.labels, strict=True):
            check_labels("solve", F, labels, self.loss_name)
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
        """H dF / n, of one dF or of several in front."""
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
                gradients = torch.autograd.grad(f, leaves, g.to(f.dtype), allow_unused=True, materialize_grads=True)
                total = total + torch.cat([gradient.flatten() for gradient in gradients])
        return total


class _Span:
    """The orthonormal directions Q found so far, their images J Q, and Φ at δ0 + Q c as a function of c."""

    def __init__(self, problem: _Problem, delta: Tensor, outputs: Sequence[Tensor], ridge: float) -> None:
        self.problem, self.delta, self.outputs, self.ridge = problem, delta, outputs, ridge
        self.basis: list[Tensor] = []
        self.images: list[Sequence[Tensor]] = []
        self.coefficients = torch.zeros(0, dtype=torch.float64, device=delta.device)
        self.rounding = 100.0 * torch.finfo(delta.dtype).eps

    def new(self, v: Tensor) -> Tensor | None:
        """The part of v orthogonal to the basis, of length 1; None where rounding alone is left."""
        scale = float(v.norm())
        for q in self.basis * 2:  # once leaves rounding of the size of v
            v = v - (q @ v) * q
        left = float(v.norm())
        return v / left if left > self.rounding * scale else None

    def add(self, q: Tensor, image: Sequence[Tensor]) -> None:
        self.basis.append(q)
        self.images.append(image)

    def minimum(self) -> tuple[Tensor, list[Tensor]]:
        """(δ, F(δ)) where Φ is least: Newton's method in as many unknowns as there are directions."""
        Q = torch.stack(self.basis)
        JQ = [torch.stack(images).double() for images in zip(*self.images, strict=True)]
        along = (Q @ self.delta).double()
        c = torch.cat([self.coefficients, self.coefficients.new_zeros(len(Q) - len(self.coefficients))])

        def at(c: Tensor) -> tuple[float, list[Tensor]]:
            """Φ without its constant, F."""
            outputs = [F + torch.tensordot(c, dF, 1) for F, dF in zip(self.outputs, JQ, strict=True)]
            return self.problem.loss(outputs) + self.ridge * float(c @ (0.5 * c + along)), outputs

        value, outputs = at(c)
        for _ in range(100):
            gradient = self.ridge * (c + along)
            curvature = self.ridge * torch.eye(len(c), dtype=c.dtype, device=c.device)
            for F, g, dF in zip(outputs, self.problem.gradient(outputs), JQ, strict=True):
                gradient = gradient + dF.flatten(1) @ g.flatten()
                curvature = curvature + dF.flatten(1) @ self.problem.curvature(F, dF).flatten(1).t()
            step = -torch.linalg.pinv(curvature, hermitian=True) @ gradient
            slope = float(gradient @ step)
            if -slope <= 1e-12 * abs(value):
                break
            for t in (0.5**k for k in range(40)):
                lower, there = at(c + t * step)
                if lower <= value + 1e-4 * t * slope:
                    break
            else:
                break
            c, value, outputs = c + t * step, lower, there
        self.coefficients = c
        return self.delta + c.to(Q.dtype) @ Q, outputs
