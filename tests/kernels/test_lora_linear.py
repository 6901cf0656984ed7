"""Model scope: the two streams of a layer against the formulas in float64."""

import kernel_oracles as oracle
import pytest
import torch
from kernel_oracles import RECOMPUTE, assert_close, layer
from linlora.kernels.lora_linear import lora_linear

from linlora import kernels, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMS = [pytest.param(False, id="pair"), pytest.param(True, id="short")]


def dual_layer(*args, **options) -> dict:
    arguments = layer(*args, **options)
    return {"x": arguments.pop("x"), "x_tangent": layer(*args, **options)["x"], **arguments}


def check(arguments: dict, scaling: float = 0.7, primal: bool = True, **options) -> None:
    outputs = lora_linear(**arguments, scaling=scaling, primal=primal, config=RECOMPUTE, **options)
    expected = list(oracle.lora_linear(**arguments, scaling=scaling, **options))
    if not primal:
        expected[0] = torch.empty(0)
    for name, actual, wanted in zip(("y", "y_tangent", "u", "c"), outputs, expected, strict=True):
        assert actual.dtype == arguments["x"].dtype
        assert_close(name, actual, wanted)


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_the_formula(device, dtype, short):
    check(dual_layer(37, 72, 96, 16, dtype, device, short=short))


@pytest.mark.parametrize("rank", [1, 4, 33, 64, 256])
def test_every_rank(device, rank):
    check(dual_layer(5, 40, 32, rank, FP16, device))


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("rank", [65, 100, 256])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_several_blocks_of_ranks(device, dtype, rank, adjoint, short):
    assert rank > RECOMPUTE.block_r
    seed = torch.tensor(7, device=device)
    check(dual_layer(20, 40, 72, rank, dtype, device, short=short), dropout_p=0.4, seed=seed, adjoint=adjoint)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 29, 17), (5, 130, 96), (37, 29, 17), (37, 130, 1)])
def test_odd_sizes(device, m, n, k):
    check(dual_layer(m, n, k, 4, FP32, device))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_fp32_factors_beside_16_bit_activations(device, dtype):
    check(dual_layer(20, 40, 64, 8, dtype, device, factor_dtype=FP32))


def test_arbitrary_strides(device):
    arguments = dual_layer(20, 40, 64, 8, FP32, device)
    for name, tensor in arguments.items():
        arguments[name] = torch.stack([tensor.t(), tensor.t()], -1)[..., 0].t() if tensor.ndim == 2 else tensor
        assert tensor.ndim == 1 or not arguments[name].is_contiguous()
    check(arguments)


@pytest.mark.parametrize("primal", [True, False], ids=["primal", "tangent-only"])
@pytest.mark.parametrize("tangent", [True, False], ids=["x_t", "no-x_t"])
@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("rank", [8, 80])
def test_streams_left_out(device, rank, short, tangent, primal):
    arguments = {**dual_layer(20, 40, 64, rank, FP32, device, short=short), "bias": None}
    check(arguments if tangent else {**arguments, "x_tangent": None}, primal=primal)


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
def test_one_dropout_mask_serves_both_streams(device, adjoint, short):
    seed = torch.tensor(2**31 - 5, device=device)
    check(dual_layer(20, 40, 64, 8, FP32, device, short=short), dropout_p=0.4, seed=seed, adjoint=adjoint)


def test_the_mask_is_the_references_bit_for_bit(device):
    m, k = 37, 64
    seed, eye = torch.tensor(5, device=device), torch.eye(k, device=device)
    ones, zero = torch.ones(m, k, device=device), torch.zeros(k, k, device=device)
    *_, u, c = lora_linear(0 * ones, ones, zero, None, eye, zero, zero, zero, 1.0, 0.3, seed, config=RECOMPUTE)
    assert not u.any()
    assert torch.equal(c != 0, reference.keep_mask(m, k, 0.3, seed))


def test_the_backward_is_the_same_kernel_with_the_streams_swapped(device):
    a = dual_layer(20, 40, 64, 8, FP32, device)
    seed = torch.tensor(77, device=device)
    x, x_tangent = a["x"].clone().requires_grad_(), a["x_tangent"].clone().requires_grad_()
    outputs = reference.lora_linear(
        x, a["weight"], None, a["shrink"], a["expand"], a["d_shrink"], a["d_expand"], 0.5, x_tangent,
        dropout_p=0.25, seed=seed,
    )  # fmt: skip
    g, g_tangent = torch.randn_like(outputs[0]), torch.randn_like(outputs[1])
    expected = torch.autograd.grad(outputs, (x_tangent, x), (g, g_tangent))
    dx_tangent, dx, _, _ = lora_linear(
        g_tangent, g, a["weight"].t(), None, a["expand"].t(), a["d_expand"].t(), a["shrink"].t(), a["d_shrink"].t(),
        0.5, 0.25, seed, adjoint=True, config=RECOMPUTE,
    )  # fmt: skip
    assert_close("dx_tangent", dx_tangent, expected[0].double())
    assert_close("dx", dx, expected[1].double())


def test_empty_sides(device):
    outputs = lora_linear(**dual_layer(0, 40, 64, 8, FP32, device), scaling=1.0)
    assert [tuple(output.shape) for output in outputs] == [(0, 40), (0, 40), (0, 8), (0, 8)]
    no_input = dual_layer(5, 40, 0, 8, FP32, device)
    y, y_tangent, _, _ = lora_linear(**no_input, scaling=1.0)
    assert torch.equal(y, no_input["bias"].expand(5, 40))
    assert not y_tangent.any()


def test_repeats_to_the_bit(device):
    arguments = dual_layer(37, 72, 96, 16, FP16, device)
    for one, other in zip(*(lora_linear(**arguments, scaling=0.7) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_refuses_a_tangent_of_another_shape(device):
    arguments = dual_layer(20, 40, 64, 8, FP32, device)
    with pytest.raises(ValueError, match=r"x_tangent is \(20, 64\)"):
        lora_linear(**{**arguments, "x_tangent": arguments["x"][:19]}, scaling=1.0)


def test_compiles_without_a_graph_break(device):
    arguments = dual_layer(5, 24, 32, 4, FP32, device)
    compiled = torch.compile(lambda **a: kernels.lora_linear(**a), fullgraph=True, backend="aot_eager")
    expected = oracle.lora_linear(**arguments, scaling=0.7)
    for actual, wanted in zip(compiled(**arguments, scaling=0.7), expected, strict=True):
        assert_close("output", actual, wanted)
