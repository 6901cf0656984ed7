"""AdaMerging: the coefficients of task vectors, trained to make the model certain about unlabeled inputs.

δ = Σᵢ λᵢ δᵢ is linear in λ, so the gradient of a loss L of the model in λ needs its gradient in δ alone:

    ∂L/∂λᵢ = ⟨∂L/∂δ, δᵢ⟩        over the whole vector, or over one layer for the λᵢ of that layer

One ordinary forward and backward pass of the model at δ gives ∂L/∂δ, at either scope of linearization (at model scope
it is the vjp of the primal); the model is not rewritten and no operation of it sees λ.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linlora.fusion.arithmetic import WeightedSum
from linlora.fusion.checks import check_count, check_number, checked
from linlora.fusion.inference import Logits, main_logits
from linlora.fusion.search import bar
from linlora.fusion.tensorwise import fused
from linlora.layers.temporary import displaced, evaluating, trainable
from linlora.storage.tensors import wide
from linlora.vectors.adapters import delta_parameters
from linlora.vectors.points import point_name
from linlora.vectors.task_vector import TaskVector

if TYPE_CHECKING:
    from peft import PeftModel


def adamerging(
    vectors: Iterable[TaskVector],
    model: PeftModel,
    inputs: Sequence[Iterable[Any]],
    level: str = "layer",
    initial: float = 0.3,
    steps: int = 500,
    learning_rate: float = 1e-3,
    logits: Logits = main_logits,
    progress: bool = True,
) -> TaskVector:
    """Σᵢ λᵢ δᵢ of the λ in [0, 1] with the least entropy Σₜ mean H(softmax F(xₜ)) (arXiv 2310.02575).

    H(p) = −Σ p log p over the classes, the mean over the unlabeled inputs xₜ of a task t, one batch of each task a
    step. Adam with learning rate 1e-3 for 500 steps from λ = 0.3, as published.

    Args:
        model: a PeftModel at the vectors' linearization point; it is left unchanged.
        inputs: for each task its batches, unlabeled, as a list or a DataLoader (it is gone through again and again).
        level: "task", one λ for a vector, or "layer", one for each LoRA layer of a vector (its dA and dB together).
        initial: λ to start from.
        logits: of (model, batch), classes last; `model(**batch)[0]` if not given. A model with one head a task takes
            batches that say which.
        progress: show a bar, where stderr is a terminal.

    Holds all vectors, on the device of the model, and three more.

    >>> import linlora
    >>> model, batch = linlora.testing.tiny_model("bert"), linlora.testing.tiny_batch("bert")
    >>> _ = linlora.linearize(model)
    >>> linlora.testing.randomize(model, 1, ("lora_B",))
    >>> vector = TaskVector.from_model(model)
    >>> adamerging([vector], model, [[batch]], steps=2).norm() < vector.norm()
    True
    """
    vectors = list(checked(vectors))
    check_number("adamerging", "initial", initial)
    check_number("adamerging", "learning_rate", learning_rate)
    check_count("adamerging", "steps", steps)
    if not 0.0 <= initial <= 1.0:
        raise ValueError(f"adamerging: initial is a λ, at least 0 and at most 1, got {initial}")
    if level not in ("task", "layer"):
        raise ValueError(f"adamerging: unknown level {level!r}; choose 'task' or 'layer'")
    if not inputs:
        raise ValueError("adamerging: inputs holds no task; pass the unlabeled batches of each")
    first = vectors[0]
    current = TaskVector.from_model(model, point=first if first.scope == "lora" else None)
    first.check_same_point(replace(current, base_model=None))
    parameters = delta_parameters(model)
    point = (first.point or {}) if first.scope == "lora" else {}  # plain LoRA's parameters are A0 + dA, B0 + dB
    start = {name: point[point_name(name)].to(p.device) for name, p in parameters.items() if point}
    deltas = [{name: v.deltas[name].to(parameter.device) for name, parameter in parameters.items()} for v in vectors]
    rows = _rows(first, level)
    raw = torch.full((1 + max(rows.values()), len(vectors)), float(initial), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=learning_rate)
    batches = [_endless(of_task, task) for task, of_task in enumerate(inputs)]
    with evaluating(model), trainable(parameters), torch.enable_grad():
        for _ in bar(range(steps), "adamerging", progress):
            optimizer.zero_grad()
            combined = _combined(deltas, raw.clamp(0.0, 1.0), rows)
            at = {name: delta.detach() + start.get(name, 0.0) for name, delta in combined.items()}
            with displaced(parameters, at):
                gradients = _gradients(model, parameters, [next(of_task) for of_task in batches], logits)
            torch.autograd.backward(list(combined.values()), [gradients[name] for name in combined])
            optimizer.step()
    return fused(vectors, SumByRows(raw.detach().clamp(0.0, 1.0).tolist(), rows))


class SumByRows(WeightedSum):
    """Σᵢ λᵢ δᵢ, tensor by tensor, with the λ of the row of each."""

    def __init__(self, lambdas: list[list[float]], rows: Mapping[str, int]) -> None:
        super().__init__("adamerging")
        self.lambdas, self.rows = lambdas, rows

    def add(self, state: Tensor, index: int, name: str, delta: Tensor) -> None:
        state.add_(delta.to(state.dtype), alpha=self.lambdas[self.rows[name]][index])


def _gradients(
    model: PeftModel, parameters: Mapping[str, nn.Parameter], batches: Sequence[Any], logits: Logits
) -> dict[str, Tensor]:
    """∂/∂δ of the entropies of all tasks, summed, one graph at a time; a batch of each task."""
    total = {name: torch.zeros_like(parameter, dtype=wide(parameter.dtype)) for name, parameter in parameters.items()}
    for task, batch in enumerate(batches):
        entropy = mean_entropy(logits(model, batch))
        if not entropy.isfinite():
            raise ValueError(f"adamerging: the entropy of task {task} is {entropy}; the vectors or the model diverged")
        of_task = torch.autograd.grad(entropy, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, of_task, strict=True):
            total[name] += gradient
    return total


def mean_entropy(logits: Tensor) -> Tensor:
    """H(softmax z) = −Σ p log p over the last dimension, the mean over the others.

    >>> round(float(mean_entropy(torch.zeros(2, 4)).exp()), 3)
    4.0
    """
    log_p = logits.to(wide(logits.dtype)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def _combined(deltas: Sequence[Mapping[str, Tensor]], lambdas: Tensor, rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Σᵢ λᵢ δᵢ as a function of λ."""
    combined = {}
    for name, row in rows.items():
        of_each = [of_vector[name] for of_vector in deltas]
        terms = [weight * delta.to(wide(delta.dtype)) for weight, delta in zip(lambdas[row], of_each, strict=True)]
        combined[name] = functools.reduce(torch.add, terms)
    return combined


def _rows(vector: TaskVector, level: str) -> dict[str, int]:
    """The row of λ of every tensor of a vector."""
    layers = list(vector.scalings)
    return {name: layers.index(name.rpartition(".")[0]) if level == "layer" else 0 for name in vector.deltas}


def _endless(batches: Iterable[Any], task: int) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"adamerging: there is no unlabeled batch of task {task}, or no second pass through them")
