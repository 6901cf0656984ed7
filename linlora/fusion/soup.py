"""LoRA-Soups: a weight for every adapter and layer, learnt on labeled examples of what the fused model is for.

    ΔW of a layer = Σₜ softmax(w)ₜ ΔWₜ        w of each layer by Adam, everything else frozen        (arXiv 2410.13025)

Factors side by side hold the result exactly, of the rank of all adapters. The weights of a layer are positive and add
up to one, so a soup averages; it does not reach the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from linlora.fusion.checks import check_count, check_number
from linlora.fusion.layerwise import Layer, fused_sizes, layer, summed, weight_vectors
from linlora.fusion.search import bar
from linlora.fusion.truncation import OutRank
from linlora.layers.temporary import evaluating
from linlora.layers.weights import Update
from linlora.vectors.task_vector import TaskVector

Loss = Callable[[nn.Module, Any], Tensor]


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss of a transformers model called with labels."""
    return model(**batch).loss


def soup(
    vectors: Iterable[TaskVector],
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss = own_loss,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    out_rank: OutRank = "exact",
    energy: float | None = None,
    progress: bool = True,
) -> TaskVector:
    """LoRA-Soups CAT: Σₜ softmax(w)ₜ ΔWₜ of the w that lower a loss, one for each adapter and layer (arXiv 2410.13025).

    Args:
        model: the base model the adapters are of, without one; it is left unchanged.
        batches: with labels, of a validation or training split, as a list or a DataLoader.
        loss: of (model, batch).
        epochs: through the batches; 1 of 10,000 examples as published, in batches of 10.
        learning_rate: Adam's; 1e-4 as published. The w start at zero, the average, and not at random ones.
        out_rank, energy: cut the rank of the result (`linlora.fusion.truncation`).
        progress: show a bar, where stderr is a terminal.

    Holds all vectors, on the device of the model.
    """
    in_weights = weight_vectors(vectors)
    check_count("soup", "epochs", epochs)
    check_number("soup", "learning_rate", learning_rate)
    modules = dict(model.named_modules())
    if not len(batches):
        raise ValueError("soup: there is no batch")
    parts = {name: layer(in_weights, name) for name in fused_sizes(in_weights)}
    if missing := [name for name in parts if name not in modules]:
        raise ValueError(f"soup: the model has no layer '{missing[0]}'; pass the base model, without an adapter")
    device = next(model.parameters()).device
    raw = {name: torch.zeros(len(in_weights), device=device, requires_grad=True) for name in parts}
    optimizer = torch.optim.Adam(list(raw.values()), lr=learning_rate)
    with evaluating(model), torch.enable_grad(), ExitStack() as hooks:
        for name, w in raw.items():
            updates = [Update(update.A.to(device), update.B.to(device)) for update in parts[name].updates]
            hooks.callback(modules[name].register_forward_hook(functools.partial(_with_soup, updates, w)).remove)
        for batch in bar([batch for _ in range(epochs) for batch in batches], "soup", progress):
            value = loss(model, batch)
            if not value.isfinite():
                raise ValueError(f"soup: the loss is {value}; the adapters or the model diverged")
            of_each = torch.autograd.grad(value, list(raw.values()), allow_unused=True, materialize_grads=True)
            for w, gradient in zip(raw.values(), of_each, strict=True):
                w.grad = gradient
            optimizer.step()
    shares = {name: _by_vector(parts[name], w.detach().double().softmax(0).tolist()) for name, w in raw.items()}
    return summed(in_weights, shares.__getitem__, out_rank, energy)


def _with_soup(
    updates: Sequence[Update], w: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """A forward hook of a linear layer: its output with that of Σₜ softmax(w)ₜ ΔWₜ added."""
    for share, update in zip(w.softmax(0), updates, strict=False):  # the last ones are of vectors that lack the layer
        A, B = update.A.to(inputs[0]), update.B.to(inputs[0])
        output = output + (share * (inputs[0] @ A.T @ B.T)).to(output.dtype)
    return output


def _by_vector(of: Layer, shares: Sequence[float]) -> list[float]:
    """The shares of a layer, which are in the order of its ΔW, by the places of the vectors."""
    lacking = [index for index in range(len(shares)) if index not in of.indices]
    placed = dict(zip([*of.indices, *lacking], shares, strict=True))
    return [placed[index] for index in range(len(shares))]
