"""PEFT's `add_weighted_adapter` where it does the same: on the factors of plain LoRA, tensor by tensor.

PEFT weighs A and B by the square root of weight · scaling each and trims every tensor by itself, so the weights here
undo its scaling and our methods run on vectors of one tensor.
"""

from dataclasses import replace

import numpy as np
import peft.utils.merge_utils
import pytest
import torch

import linlora
from linlora import TaskVector
from linlora.fusion.dare import thin
from linlora.testing import randomize, tiny_model

NAMES = ["one", "two", "three"]
RESCALES = bool((peft.utils.merge_utils.random_pruning(torch.ones(64), 0.5, rescale=True) == 2.0).any())


@pytest.fixture(scope="module")
def adapters():
    """(model, vectors): three adapters, and what they hold as vectors from zero."""
    model = tiny_model("bert", target_modules=["query", "value"])
    for name in NAMES:
        model.add_adapter(name, model.peft_config["default"])
    randomize(model, scale=0.0)
    zeros = [TaskVector.from_model(model, name) for name in NAMES]
    randomize(model, scale=1.0)
    return model, [TaskVector.from_model(model, name, point=zero) for name, zero in zip(NAMES, zeros, strict=True)]


def merged_by_peft(adapters, combination_type, weight=1.0, **options):
    model, vectors = adapters
    scaling = next(iter(vectors[0].scalings.values()))
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    model.add_weighted_adapter(NAMES, [weight / scaling] * 3, "merged", combination_type, **options)
    return TaskVector.from_model(model, "merged", point=0.0 * vectors[0]).deltas


def by_tensor(vectors, method, **options):
    return {
        name: linlora.fuse([replace(v, deltas={name: v.deltas[name]}) for v in vectors], method, **options).deltas[name]
        for name in vectors[0].deltas
    }


def test_the_fixture_holds_three_different_adapters(adapters):
    np.testing.assert_allclose(linlora.fusion.cosines(adapters[1]), np.eye(3), atol=0.2)


def test_linear(adapters):
    ours = by_tensor(adapters[1], "task_arithmetic", scaling=0.5)
    torch.testing.assert_close(ours, merged_by_peft(adapters, "linear", weight=0.25))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties(adapters, density):
    ours = by_tensor(adapters[1], "ties", keep=density)
    torch.testing.assert_close(ours, merged_by_peft(adapters, "ties", density=density))


@pytest.mark.skipif(not RESCALES, reason="this PEFT's DARE does not rescale: it drops the result of the division")
@pytest.mark.parametrize(
    ("combination_type", "options"),
    [
        ("dare_linear", {"combine": "task_arithmetic", "scaling": 1.0}),
        ("dare_ties", {"combine": "ties", "keep": 1.0}),
    ],
)
def test_dare_with_the_same_masks(adapters, monkeypatch, combination_type, options):
    """PEFT draws from the global generator; it is given our masks instead."""
    masks = [
        (delta, (thin(delta, 0.4, 7, index, name) != 0).float())
        for index, vector in enumerate(adapters[1])
        for name, delta in vector.deltas.items()
    ]

    def drawn(input, fill_value):
        assert fill_value == pytest.approx(0.6)
        return torch.full(input.shape, float(next(i for i, (d, _) in enumerate(masks) if torch.equal(d, input))))

    monkeypatch.setattr(peft.utils.merge_utils.torch, "full_like", drawn)
    monkeypatch.setattr(peft.utils.merge_utils.torch, "bernoulli", lambda index: masks[int(index.flatten()[0])][1])
    theirs = merged_by_peft(adapters, combination_type, density=0.6)
    monkeypatch.undo()
    ours = linlora.fuse(adapters[1], "dare", drop=0.4, seed=7, **options).deltas
    torch.testing.assert_close(ours, theirs)
