"""DARE: what is dropped, what the rest becomes, and how it is combined."""

import pytest
import torch

import linlora
from linlora.fusion.dare import thin
from linlora.fusion.tensorwise import mapped


def test_survivors_are_rescaled_and_the_expectation_stays(made):
    (vector,) = made([0.1] * 40_000)
    thinned = linlora.fuse([vector], "dare", drop=0.9, scaling=1.0).deltas["q.dB"]
    torch.testing.assert_close(thinned.unique(), torch.tensor([0.0, 1.0]))
    assert float(thinned.mean()) == pytest.approx(0.1, rel=0.06)  # 4 standard deviations of the mean


def test_masks_follow_the_seed_and_differ_from_vector_to_vector(made):
    ones = made([1.0] * 64)
    fused = [linlora.fuse(ones, "dare", drop=0.5, seed=seed).deltas["q.dB"] for seed in (0, 0, 1)]
    assert torch.equal(fused[0], fused[1])
    assert not torch.equal(fused[0], fused[2])
    both = linlora.fuse(made([1.0] * 64, [1.0] * 64), "dare", drop=0.5, scaling=0.5).deltas["q.dB"]
    assert set(both.tolist()) == {0.0, 1.0, 2.0}


def test_global_random_numbers_are_left_alone(made):
    before = torch.get_rng_state()
    linlora.fuse(made([1.0] * 64), "dare")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("combine", ["task_arithmetic", "ties"])
def test_is_the_method_it_combines_by_on_thinned_vectors(vectors, flat, combine):
    thinned = [
        mapped(vector, lambda name, delta, index=index: thin(delta, 0.8, 3, index, name))
        for index, vector in enumerate(vectors)
    ]
    fused = linlora.fuse(vectors, "dare", drop=0.8, seed=3, combine=combine, scaling=0.7)
    torch.testing.assert_close(flat(fused), flat(linlora.fuse(thinned, combine, scaling=0.7)))


def test_the_published_defaults_of_the_combining_method_apply(vectors, flat):
    fused = linlora.fuse(vectors, "dare", drop=0.0)
    torch.testing.assert_close(flat(fused), 0.3 * sum(map(flat, vectors)), rtol=1e-5, atol=1e-6)
