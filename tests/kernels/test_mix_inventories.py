"""Mixing launches: every width of a block, counters that return to zero, tables made once a model."""

import pytest
import torch
from linlora.kernels import counters
from linlora.kernels.mix_inventories import Layer, mix_inventories, plan_of, unmix_inventories

from linlora import reference


def layer(Q, S, K, N, r, T, device):
    return (
        torch.randn(Q, S, K // Q, r, device=device),
        torch.randn(Q, S, r, N // Q, device=device),
        torch.rand(T, Q, S, device=device),
    )


# one block, exactly a block, several blocks, heads that cut across blocks, more tasks than a block holds
SIZES = [(1, 2, 3, 5, 1, 1), (1, 2, 64, 64, 4, 3), (1, 3, 300, 70, 4, 2), (5, 2, 35, 700, 3, 4), (2, 5, 8, 6, 2, 37)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mixing_and_its_adjoint(device, size):
    A, B, w = layer(*size, device)
    (mixed_A,), (mixed_B,) = mix_inventories([A], [B], [w])
    exact = [tensor.double().requires_grad_() for tensor in (A, B, w)]
    (expected_A,), (expected_B,) = reference.mix_inventories(*([tensor] for tensor in exact))
    d_A, d_B = torch.randn_like(mixed_A), torch.randn_like(mixed_B)
    gradients = unmix_inventories([d_A], [d_B], [A], [B], [w], [True], [True], [True])
    wanted = torch.autograd.grad((expected_A, expected_B), exact, (d_A.double(), d_B.double()))
    for actual, expected in zip(
        (mixed_A, mixed_B, *(g for (g,) in gradients)), (expected_A, expected_B, *wanted), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-5)
    assert not any(buffer.any() for buffer in counters._buffers.values())


def test_the_tables_of_a_models_layers_are_made_once(device):
    plan_of.cache_clear()
    lists = tuple(zip(*(layer(*size, device) for size in SIZES), strict=True))
    for _ in range(2):
        mix_inventories(*map(list, lists))
    assert plan_of.cache_info().misses == 1


def test_a_plan_has_a_program_for_every_block_of_every_head():
    plan = plan_of((Layer(3, 2, 4, 8, 600, 2), Layer(3, 1, 1, 0, 10, 1)), 256, torch.device("cpu"))
    first_layer = [(0, head, block) for head in range(2) for block in range(1 + 3)]
    assert plan.table[:-3].view(-1, 3).tolist() == [list(p) for p in (*first_layer, (1, 0, 0))]
    assert plan.table[-3:].tolist() == [0, 48, 96]
    assert (plan.programs, plan.rows, plan.partials, plan.tasks) == (9, 3, 99, 3)
