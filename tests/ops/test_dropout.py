"""The dropout mask: a function of (seed, row, column), one for primal and tangent, the same however it is made."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import linlora
from linlora import functional, reference
from linlora.ops import aten


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
    starts = torch.tensor([[0], [100], [200]], dtype=torch.int32)
    assert torch.equal(whole, reference.keep_mask(100, 17, 0.4, torch.tensor(5), starts).flatten(0, 1))
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_a_seed_a_mask_is_drawn_and_read_again_in_backward(device, backend):
    """Of W = 0, A0 = 1 and dB = 1, dx is the mask s / (1 - p) of every element, and y sums it over a row."""
    x = torch.ones(300, 70, device=device, requires_grad=True)
    zero, ones = torch.zeros(1, 70, device=device), torch.ones(1, 70, device=device)
    one = torch.ones(1, 1, device=device, requires_grad=True)
    masks = []
    with linlora.use_backend(backend):
        for generator in (1, 1, 2):
            torch.manual_seed(generator)
            y = functional.linearized_lora_linear(x, zero, None, ones, None, None, one, 2.0, dropout_p=0.25)
            dx, d_one = torch.autograd.grad(y.sum(), (x, one))
            torch.testing.assert_close(dx.sum(1, keepdim=True), y.detach())
            torch.testing.assert_close(d_one.sum(), y.sum().detach())
            masks.append(dx)
    assert torch.equal(*masks[:2])
    assert not torch.equal(*masks[1:])
    torch.testing.assert_close(masks[0].unique(), torch.tensor([0.0, 2.0 / 0.75], device=device))
    assert abs((masks[0] > 0).double().mean() - 0.75) < 5 * (0.25 * 0.75 / 21000) ** 0.5


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 0.9, 0.999999])
def test_a_drawn_mask_keeps_its_share_and_has_neighbours_that_are_strangers(p):
    mask = aten.mask(torch.empty(1001, 703), p, None).double()
    spread = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 5 * spread + 2**-16
    centred = mask - mask.mean()
    for neighbours in (centred[:, 1:] * centred[:, :-1], centred[:, 4:] * centred[:, :-4], centred[1:] * centred[:-1]):
        assert abs(neighbours.mean()) <= 5 * p * (1 - p) / neighbours.numel() ** 0.5 + 2**-16


def test_a_checkpointed_layer_draws_the_same_mask_again():
    x, one = torch.ones(30, 70, requires_grad=True), torch.ones(1, 1, requires_grad=True)

    def layer(x):
        ones = torch.ones(1, 70)
        return functional.linearized_lora_linear(x, 0 * ones, None, ones, None, None, one, 2.0, dropout_p=0.25)

    y = checkpoint(layer, x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx.sum(1, keepdim=True), y.detach())
