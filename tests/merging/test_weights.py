"""Updates folded into weights: rounded once, and taken out again bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linlora import reference
from linlora.layers import weights
from linlora.layers.weights import Update, fold, fold_keeping, stacked, unfold

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def bits(weight):
    return weight.flatten().clone().view(torch.uint8)


def update(n, k, rank, size, dtype=torch.float32, seed=0, transposed=False):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, k, generator=generator), size * torch.randn(n, rank, generator=generator)
    return Update(A.to(dtype), B.to(dtype), transposed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_once(dtype):
    """The nearest number to the exact sum, up to the rounding of float32 (or float64) sums of products."""
    weight = torch.randn(300, 70).to(dtype)
    made = update(300, 70, 8, 0.01, torch.promote_types(dtype, torch.float32))
    exact = weight.double() + made.B.double() @ made.A.double()
    fold(weight, made)
    half = 0.5001 * exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    products = torch.finfo(made.A.dtype).eps * (weight.double().abs() + made.B.double().abs() @ made.A.double().abs())
    assert bool(((weight.double() - exact).abs() <= half + 8 * products).all())


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    rank=st.integers(1, 5),
    size=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 1e3]),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_unfolding_restores_every_bit(n, k, rank, size, dtype, transposed, strided, seed):
    made = update(n, k, rank, size, torch.promote_types(dtype, torch.float32), seed, transposed)
    shape = (k, n) if transposed else (n, k)
    weight = (torch.randn(shape[::-1]).t() if strided else torch.randn(shape)).to(dtype)
    weight[0, 0] = -0.0
    before = weight.clone()
    unfold(weight, fold_keeping(weight, made))
    assert torch.equal(bits(weight), bits(before))


def test_many_blocks_restore_and_keep_little(monkeypatch):
    monkeypatch.setattr(weights, "BLOCK", 1000)
    weight = torch.randn(257, 64).bfloat16()
    before, plain = weight.clone(), weight.clone()
    made = update(257, 64, 2, 0.005)
    kept = fold_keeping(weight, made)
    fold(plain, made)
    assert torch.equal(bits(weight), bits(plain))
    factors = 4 * (made.A.numel() + made.B.numel())
    assert len(kept.lost) == 18
    assert kept.nbytes - factors < 0.1 * 2 * weight.numel()
    unfold(weight, kept)
    assert torch.equal(bits(weight), bits(before))


def test_where_the_update_drowns_the_weight_the_weight_itself_is_kept():
    weight = torch.randn(64, 64).bfloat16()
    made = update(64, 64, 2, 1e4)
    kept = fold_keeping(weight, made)
    assert kept.nbytes == 4 * (made.A.numel() + made.B.numel()) + 2 * weight.numel()


def test_the_fold_does_not_care_what_becomes_of_the_caller_s_factors():
    weight = torch.randn(8, 8)
    before = weight.clone()
    A, B = torch.randn(2, 8), torch.randn(8, 2)
    kept = fold_keeping(weight, Update(*stacked(A, None, None, B)))
    B.zero_()
    A.zero_()
    unfold(weight, kept)
    assert torch.equal(weight, before)


def test_a_weight_that_changed_meanwhile_is_reported():
    weight = torch.randn(8, 8)
    kept = fold_keeping(weight, update(8, 8, 2, 0.1))
    weight[3, 3] += 1.0
    changed = weight.clone()
    with pytest.raises(ValueError, match="the weight was changed while adapters were merged into it"):
        unfold(weight, kept)
    assert torch.equal(weight, changed)
    with pytest.raises(ValueError, match=r"merged as torch.float32 and is torch.bfloat16 now; unmerge before"):
        unfold(weight.bfloat16(), kept)


def test_arithmetic_that_rounds_otherwise_is_reported():
    weight = torch.randn(64, 64).bfloat16()
    kept = fold_keeping(weight, update(64, 64, 2, 0.01))
    kept.update.B.mul_(1.5)
    with pytest.raises(RuntimeError, match="sums are rounded otherwise"):
        unfold(weight, kept)


@pytest.mark.parametrize("start", ["zero", "trained"])
def test_stacked_factors_are_the_reference(start):
    A0, dA = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    B0, dB = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    B0 = None if start == "zero" else B0
    A, B = stacked(A0, B0, dA, dB, 0.7)
    torch.testing.assert_close(B @ A, reference.delta_weight(A0, B0, dA, dB, 0.7))
    assert A.shape == ((3, 5) if start == "zero" else (6, 5))
    assert stacked(A0.bfloat16(), None, None, dB.bfloat16())[0].dtype == torch.float32
