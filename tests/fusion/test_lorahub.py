"""LoraHub where its optimum is known, and through models."""

import sys

import numpy as np
import pytest
import torch

import linlora
from linlora.testing import tiny_batch

pytestmark = pytest.mark.filterwarnings("ignore:COBYLA:UserWarning")  # nevergrad's own choice of rhoend


@pytest.fixture
def weights(made):
    """The weights found for an objective of the weights."""

    def weights(count, cost, **options):
        vectors = made(*torch.eye(count).tolist(), dtype=torch.float64)
        fused = linlora.fuse(vectors, "lorahub", objective=lambda v: cost(v.deltas["q.dB"].tolist()), **options)
        return fused.deltas["q.dB"].tolist()

    return weights


def test_the_optimum_of_a_square(made, flat):
    """For δ1 ⊥ δ2 of length 1 the cost is Σ (wᵢ - tᵢ)² + 0.05 (|w1| + |w2|) / 2: least at tᵢ - 0.0125 sign tᵢ."""
    vectors = made([1.0, 0.0], [0.0, 1.0])
    target = torch.tensor([1.0, -0.5])
    fused = linlora.fuse(vectors, "lorahub", objective=lambda v: float((v.deltas["q.dB"] - target).square().sum()))
    torch.testing.assert_close(fused.deltas["q.dB"], torch.tensor([0.9875, -0.4875]), atol=1e-3, rtol=0)


def test_weights_stay_within_the_bound_and_start_at_zero(weights):
    tried = []

    def cost(found):
        tried.append(found)
        return (found[0] - 9.0) ** 2

    assert weights(1, cost) == pytest.approx([1.5], rel=1e-3)
    assert tried[0] == [0.0]
    assert len(tried) == 40
    assert weights(1, cost, bound=0.5) == pytest.approx([0.5], rel=1e-3)


def test_a_constant_objective_is_decided_by_the_regularization(weights):
    assert weights(3, lambda ws: 1.0) == pytest.approx([0.0] * 3, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Clipping very high value")
def test_an_objective_that_is_never_finite_is_an_error(weights):
    with pytest.raises(ValueError, match="the objective was never finite in 5 calls"):
        weights(2, lambda ws: float("nan"), budget=5)
    cost = lambda ws: float("nan") if ws[0] > 0.5 else (ws[0] - 0.4) ** 2  # noqa: E731
    assert weights(1, cost, regularization=0.0) == pytest.approx([0.4], abs=1e-2)


def test_the_seed_decides_and_nothing_global_is_seeded_or_drawn_from(weights):
    def cost(found):
        return sum(np.cos(9 * np.array(found)) + np.array(found) ** 2)

    _, keys, *place = np.random.get_state()
    first, again = (weights(6, cost, budget=30, seed=3) for _ in range(2))
    assert first == again
    _, keys_after, *place_after = np.random.get_state()
    assert np.array_equal(keys_after, keys)
    assert place_after == place


def test_recovers_the_mixture_a_model_was_made_with(vectors, scope, at):
    """The objective is of the model's outputs; one of the three vectors is not in the mixture."""
    model, batch = at(scope), tiny_batch("bert", rows=8)

    def logits(vector):
        linlora.apply(model, vector)
        with torch.no_grad():
            return model(**batch).logits

    goal = logits(0.6 * vectors[0] - 0.4 * vectors[2])
    fused = linlora.fuse(
        vectors, "lorahub", objective=lambda v: float((logits(v) - goal).square().mean()), regularization=0.0, budget=90
    )
    assert float((logits(fused) - goal).norm() / (logits(0.0 * fused) - goal).norm()) < 0.05


@pytest.mark.parametrize("budget", [2, 40])
def test_what_its_solvers_tell_each_other_is_not_shown(recwarn, budget, weights):
    weights(6, lambda ws: sum((weight - 1.0) ** 2 for weight in ws), budget=budget)
    assert not [warning for warning in recwarn if "COBYLA" in str(warning.message)]


def test_a_missing_nevergrad_is_named_with_its_remedy(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ImportError, match=r"lorahub needs nevergrad.*pip install 'linlora\[lorahub\]'"):
        linlora.fuse(made([1.0]), "lorahub", objective=float)
