"""TIES against its published description, written out value by value."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linlora


def published(rows, keep):
    """Trim, elect sign, disjoint mean; rows (vectors, values)."""
    trimmed = []
    for row in rows:
        count = max(1, int(keep * len(row)))
        smallest = sorted(abs(row), reverse=True)[count - 1]
        trimmed.append([value if abs(value) >= smallest else 0.0 for value in row])
    totals = np.sum(trimmed, axis=0)
    most = np.sign(np.sign(totals).sum())
    merged = []
    for total, values in zip(totals, np.transpose(trimmed), strict=True):
        elected = np.sign(total) or most
        agreeing = [value for value in values if value and np.sign(value) == elected]
        merged.append(np.mean(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64)


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_is_the_published_method(vectors, flat, keep):
    rows = np.stack([flat(vector).numpy() for vector in vectors])
    fused = linlora.fuse(vectors, "ties", keep=keep, scaling=0.5)
    torch.testing.assert_close(flat(fused), 0.5 * published(rows, keep), rtol=1e-5, atol=1e-7)


@given(
    rows=st.lists(st.lists(st.integers(-4, 4).map(float), min_size=6, max_size=6), min_size=1, max_size=5),
    keep=st.sampled_from([0.2, 0.5, 0.75, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_is_the_published_method_with_equal_magnitudes_and_signs_that_cancel(made, flat, rows, keep):
    fused = linlora.fuse(made(*rows), "ties", keep=keep)
    torch.testing.assert_close(flat(fused), published(np.array(rows), keep), rtol=1e-5, atol=1e-6)


def test_by_hand(made):
    """keep 0.6 of five values is three of them. In the last column +2 and -2 cancel, and most totals are positive."""
    a = [5.0, -3.0, 0.5, 0.1, 2.0]  # trimmed to  5 -3  0  0  2
    b = [1.0, 4.0, -0.2, 0.1, -2.0]  # trimmed to  1  4  0  0 -2
    c = [-2.0, -3.0, 6.0, 0.3, 0.1]  # trimmed to -2 -3  6  0  0
    fused = linlora.fuse(made(a, b, c), "ties", keep=0.6, scaling=2.0)
    assert fused.deltas["q.dB"].tolist() == [2 * (5 + 1) / 2, 2 * (-3 - 3) / 2, 2 * 6.0, 0.0, 2 * 2.0]


def test_equal_vectors_fuse_to_the_trimmed_one(made):
    assert linlora.fuse(made(*[[3.0, -1.0, 2.0, -4.0]] * 4), "ties", keep=0.5).deltas["q.dB"].tolist() == [3, 0, 0, -4]


def test_the_default_keeps_a_fifth_of_the_whole_vector(vectors):
    fused = linlora.fuse(vectors[:1], "ties")
    numel = sum(delta.numel() for delta in fused.deltas.values())
    assert sum(int(delta.count_nonzero()) for delta in fused.deltas.values()) == int(0.2 * numel)


def test_nan_is_refused(made):
    with pytest.raises(ValueError, match="a vector holds NaN or infinity"):
        linlora.fuse(made([1.0, float("nan"), 2.0, 3.0, 4.0]), "ties")
