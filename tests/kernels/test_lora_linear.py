"""Model scope: the two streams of a layer against the formulas in float64."""

import kernel_oracles as oracle
import pytest
import torch
from kernel_oracles import RECOMPUTE, SHARED, assert_close, assert_result, dropped, layer
from linlora.kernels.lora_linear import host
from linlora.kernels.packing import pack
from linlora.kernels.problem import LoraLinear

from linlora import kernels, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMS = [pytest.param(False, id="pair"), pytest.param(True, id="short")]


def two_streams(*args, **options) -> LoraLinear:
    return layer(*args, **options, two_streams=True)


def check(problem: LoraLinear, primal: bool = True, save: bool = True, config=RECOMPUTE) -> None:
    result = host(problem, primal=primal, save=save, config=config)
    assert_result(result, oracle.lora_linear(problem), save, primal)


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_the_formula(device, dtype, short):
    check(two_streams(37, 72, 96, 16, dtype, device, short=short))


@pytest.mark.parametrize("rank", [1, 4, 33, 64, 256])
def test_every_rank(device, rank):
    check(two_streams(5, 40, 32, rank, FP16, device))


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("rank", [65, 100, 256])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_several_blocks_of_ranks(device, dtype, rank, adjoint, short):
    assert rank > RECOMPUTE.block_r
    check(dropped(two_streams(20, 40, 72, rank, dtype, device, short=short), seed=7, adjoint=adjoint))


@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("rank", [8, 80])
def test_programs_that_share_a_tile(device, rank, short, adjoint):
    problem = dropped(two_streams(5, 40, 72, rank, FP32, device, short=short), seed=7, adjoint=adjoint)
    check(problem, config=SHARED)
    check(problem._replace(x_tangent=None), primal=False, config=SHARED)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 29, 17), (5, 130, 96), (37, 29, 17), (37, 130, 1)])
def test_odd_sizes(device, m, n, k):
    check(two_streams(m, n, k, 4, FP32, device))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_fp32_factors_beside_16_bit_activations(device, dtype):
    check(two_streams(20, 40, 64, 8, dtype, device, factor_dtype=FP32))


def test_arbitrary_strides(device):
    problem = two_streams(20, 40, 64, 8, FP32, device)
    for name in ("x", "x_tangent", "weight", "shrink", "expand", "d_shrink", "d_expand"):
        tensor = getattr(problem, name)
        spread = torch.stack([tensor.t(), tensor.t()], -1)[..., 0].t()
        assert not spread.is_contiguous()
        problem = problem._replace(**{name: spread})
    check(problem)


@pytest.mark.parametrize("primal", [True, False], ids=["primal", "tangent-only"])
@pytest.mark.parametrize("tangent", [True, False], ids=["x_t", "no-x_t"])
@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("rank", [8, 80])
def test_streams_left_out(device, rank, short, tangent, primal):
    problem = two_streams(20, 40, 64, rank, FP32, device, short=short)._replace(bias=None)
    check(problem if tangent else problem._replace(x_tangent=None), primal=primal)


def test_without_save_the_low_rank_products_are_left_out(device):
    check(two_streams(20, 40, 64, 8, FP32, device), save=False)


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
def test_one_dropout_mask_serves_both_streams(device, adjoint, short):
    check(dropped(two_streams(20, 40, 64, 8, FP32, device, short=short), seed=2**31 - 5, adjoint=adjoint))


def test_the_mask_is_the_references_bit_for_bit(device):
    m, k = 37, 64
    seed, eye = torch.tensor(5, device=device), torch.eye(k, device=device)
    ones, zero = torch.ones(m, k, device=device), torch.zeros(k, k, device=device)
    problem = LoraLinear(0 * ones, zero, None, eye, zero, zero, zero, 1.0, ones, 0.3, seed, two_streams=True)
    *_, u, c = host(problem, config=RECOMPUTE)
    assert not u.any()
    assert torch.equal(c != 0, reference.keep_mask(m, k, 0.3, seed))


def test_the_backward_is_the_same_kernel_with_the_streams_swapped(device):
    problem = dropped(two_streams(20, 40, 64, 8, FP32, device), seed=77, p=0.25)
    x, x_tangent = problem.x.clone().requires_grad_(), problem.x_tangent.clone().requires_grad_()
    outputs = reference.lora_linear(
        x, *problem[1:8], x_tangent, dropout_p=problem.dropout_p, seed=problem.seed
    )  # fmt: skip
    g, g_tangent = torch.randn_like(outputs[0]), torch.randn_like(outputs[1])
    expected = torch.autograd.grad(outputs, (x_tangent, x), (g, g_tangent))
    dx_tangent, dx, _, _ = host(problem.adjoint(g, g_tangent), config=RECOMPUTE)
    assert_close("dx_tangent", dx_tangent, expected[0].double())
    assert_close("dx", dx, expected[1].double())


def test_empty_sides(device):
    outputs = host(two_streams(0, 40, 64, 8, FP32, device))
    assert [tuple(output.shape) for output in outputs] == [(0, 40), (0, 40), (0, 8), (0, 8)]
    no_input = two_streams(5, 40, 0, 8, FP32, device)
    y, y_tangent, _, _ = host(no_input)
    assert torch.equal(y, no_input.bias.expand(5, 40))
    assert not y_tangent.any()


def test_repeats_to_the_bit(device):
    problem = two_streams(37, 72, 96, 16, FP16, device)
    for one, other in zip(*(host(problem) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_refuses_a_tangent_of_another_shape(device):
    problem = two_streams(20, 40, 64, 8, FP32, device)
    with pytest.raises(ValueError, match=r"x_tangent is expected like x, got x \(20, 64\), x_tangent \(19, 64\)"):
        host(problem._replace(x_tangent=problem.x[:19]))


@pytest.mark.parametrize("short", FORMS)
def test_compiles_without_a_graph_break(device, short):
    problem = two_streams(5, 24, 32, 4, FP32, device, short=short)
    compiled = torch.compile(kernels.lora_linear, fullgraph=True, backend="aot_eager")
    assert_result(compiled(problem), oracle.lora_linear(problem))


def test_the_operator_keeps_the_rules_of_custom_operators(device):
    tensors, numbers = pack(two_streams(5, 24, 32, 4, FP32, device))
    torch.library.opcheck(torch.ops.linlora.lora_linear, (tensors, *numbers, True, False, ""))
