"""The dropout mask: a function of (seed, row, column), one for primal and tangent, the same however it is made."""

import pytest
import torch

from linlora import functional, reference
from linlora.ops.aten import lora as aten


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_kept_and_its_spread_are_those_of_independent_draws(p):
    rows, columns = 1500, 700
    mask = reference.keep_mask(rows, columns, p, torch.tensor(11)).double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 5 * spread / (rows * columns) ** 0.5
    assert abs(mask.mean(0).std() / (spread / rows**0.5) - 1) < 0.15
    assert abs(mask.mean(1).std() / (spread / columns**0.5) - 1) < 0.15
    centred = mask - (1 - p)
    for neighbours in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(neighbours.mean()) < 5 * spread**2 / neighbours.numel() ** 0.5


def test_different_seeds_give_unrelated_masks():
    a, b = (reference.keep_mask(400, 300, 0.5, torch.tensor(seed)) for seed in (1, 2))
    assert abs((a == b).double().mean() - 0.5) < 0.01


def test_blocks_of_rows_have_the_bits_of_the_whole_mask():
    whole = reference.keep_mask(300, 17, 0.4, torch.tensor(5))
    blocks = [reference.keep_mask(100, 17, 0.4, torch.tensor(5), first_row=first) for first in (0, 100, 200)]
    assert torch.equal(whole, torch.cat(blocks))
    x = torch.randn(300, 17)
    torch.testing.assert_close(aten.dropout(x, 0.4, torch.tensor(5)), reference.dropout(x, 0.4, torch.tensor(5)))


def test_primal_and_tangent_share_one_mask():
    """With dB = B0 and no other tangent, y_t is the low-rank part of y: equal only under the same mask."""
    x, W, A0, B0 = torch.randn(9, 8), torch.zeros(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    y, y_tangent = functional.lora_linear(
        x, W, None, A0, B0, torch.zeros_like(A0), B0, 1.0, dropout_p=0.5, seed=torch.tensor(3)
    )
    torch.testing.assert_close(y, y_tangent)
    undropped, _ = functional.lora_linear(x, W, None, A0, B0, torch.zeros_like(A0), B0, 1.0)
    assert not torch.allclose(y, undropped)
