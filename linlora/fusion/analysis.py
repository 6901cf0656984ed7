"""Measures how task vectors interfere: the angles between them, and what one does to the task of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from linlora.fusion.arithmetic import task_arithmetic
from linlora.fusion.checks import check_finite, checked
from linlora.fusion.inference import Logits, main_logits
from linlora.fusion.search import bar
from linlora.layers.temporary import evaluating
from linlora.vectors.task_vector import TaskVector, apply

if TYPE_CHECKING:
    from peft import PeftModel


def cosines(vectors: Iterable[TaskVector]) -> np.ndarray:
    """The matrix of ⟨δᵢ, δⱼ⟩ / (‖δᵢ‖ ‖δⱼ‖), accumulated in float64; 0 beside a vector that is zero.

    >>> u, v = (TaskVector({"q.dB": torch.tensor(x)}, None, "", {"q": 1.0}, "layer") for x in ([3.0, 4.0], [0.0, 2.0]))
    >>> cosines([u, v]).tolist()
    [[1.0, 0.8], [0.8, 1.0]]
    """
    vectors = list(checked(vectors))
    gram = np.empty((len(vectors), len(vectors)))
    for i, vector in enumerate(vectors):
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = vector.dot(vectors[j])
    norms = np.sqrt(gram.diagonal())
    products = np.outer(norms, norms)
    return np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)


@dataclass(frozen=True)
class Disentanglement:
    """The weight-disentanglement error of two tasks over a grid of scalings.

    Attributes:
        scalings: the grid of λ1 and of λ2, n numbers.
        rates: (2, n, n); rates[t, i, j] is the disagreement on the inputs of task t at (λ1, λ2) = scalings[i], [j].
    """

    scalings: np.ndarray
    rates: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """ξ = the sum of the two rates, (n, n), between 0 and 2."""
        return self.rates.sum(axis=0)


def disentanglement(
    first: TaskVector,
    second: TaskVector,
    predict: Callable[[TaskVector, int], Tensor],
    scalings: Sequence[float],
    progress: bool = True,
) -> Disentanglement:
    """ξ(λ1, λ2) = Σₜ P over x of task t [ class of F(x; λₜ δₜ) ≠ class of F(x; λ1 δ1 + λ2 δ2) ] on a grid of λ1 × λ2.

    The weight-disentanglement error of arXiv 2305.12827: how often the fused model answers a task otherwise than the
    model of that task alone. Of each task the rate is 0 where the other task's λ is 0.

    Args:
        predict: the classes (a tensor of integers) of the model with a vector in it, for all inputs of task 0 or 1;
            `predictor(model, inputs)` makes one.
        scalings: λ1 and λ2, n numbers each; predict is called 2 n (n + 1) times.
        progress: show a bar, where stderr is a terminal.

    >>> u, v = (TaskVector({"q.dB": torch.tensor(x)}, None, "", {"q": 1.0}, "layer") for x in ([1.0, 0.0], [0.5, 1.0]))
    >>> def predict(vector, task):  # one input a task, which sees one value of the vector
    ...     return (vector.deltas["q.dB"][task : task + 1] > 1.2).long()
    >>> disentanglement(u, v, predict, [0.0, 1.0]).error.tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    check_finite("disentanglement", "scalings", scalings)
    if not len(scalings):
        raise ValueError("disentanglement: the grid of scalings is empty")
    pair = (first, second)
    single = [[predict(scaling * vector, task) for scaling in scalings] for task, vector in enumerate(pair)]
    rates = np.empty((2, len(scalings), len(scalings)))
    for i, j in bar(list(np.ndindex(rates.shape[1:])), "disentanglement", progress):
        fused = task_arithmetic(pair, [scalings[i], scalings[j]])
        for task, own in enumerate((i, j)):
            rates[task, i, j] = float((predict(fused, task) != single[task][own]).double().mean())
    return Disentanglement(np.array(scalings, dtype=float), rates)


def predictor(
    model: PeftModel, inputs: Sequence[Sequence[Any]], logits: Logits = main_logits
) -> Callable[[TaskVector, int], Tensor]:
    """A `predict` for `disentanglement`: puts a vector into a model and takes the largest logit of every input.

    Args:
        model: a PeftModel at the vectors' point. `linlora.apply` it a vector afterwards: it keeps the last one.
        inputs: for each task its batches, unlabeled.
        logits: of (model, batch), classes last; `model(**batch)[0]` if not given.

    >>> import linlora
    >>> model, batch = linlora.testing.tiny_model("bert"), linlora.testing.tiny_batch("bert")
    >>> _ = linlora.linearize(model)
    >>> predictor(model, [[batch], [batch, batch]])(TaskVector.from_model(model), 1).shape
    torch.Size([6])
    """

    def predict(vector: TaskVector, task: int) -> Tensor:
        apply(model, vector)
        with evaluating(model), torch.no_grad():
            return torch.cat([logits(model, batch).argmax(-1).flatten().cpu() for batch in inputs[task]])

    return predict
