"""Layer scope: both designs against the formulas in float64."""

import dataclasses

import kernel_oracles as oracle
import pytest
import torch
from kernel_oracles import FLAGS, RECOMPUTE, assert_close, layer
from linlora.kernels import counters
from linlora.kernels.linearized_lora_linear import linearized_lora_linear

from linlora import kernels, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DESIGNS = [pytest.param(RECOMPUTE, id="recompute"), pytest.param(FLAGS, id="flags")]
FORMS = [pytest.param(False, id="pair"), pytest.param(True, id="short")]


def check(arguments: dict, config, scaling: float = 0.7, **options) -> None:
    outputs = linearized_lora_linear(**arguments, scaling=scaling, config=config, **options)
    expected = oracle.linearized_lora_linear(**arguments, scaling=scaling, **options)
    for name, actual, wanted in zip("yuv", outputs, expected, strict=True):
        assert actual.dtype == arguments["x"].dtype
        assert_close(name, actual, wanted)


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_the_formula(device, dtype, design, short):
    check(layer(37, 72, 96, 16, dtype, device, short=short), design)


@pytest.mark.parametrize("rank", [1, 4, 33, 64, 256])
@pytest.mark.parametrize("design", DESIGNS)
def test_every_rank(device, design, rank):
    check(layer(5, 40, 32, rank, FP16, device), design)


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("rank", [65, 100, 256])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_several_blocks_of_ranks(device, dtype, rank, adjoint, short):
    assert rank > RECOMPUTE.block_r
    seed = torch.tensor(7, device=device)
    arguments = layer(20, 40, 72, rank, dtype, device, short=short)
    check(arguments, RECOMPUTE, dropout_p=0.4, seed=seed, adjoint=adjoint)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 29, 17), (5, 130, 96), (37, 29, 17), (37, 130, 1)])
def test_odd_sizes(device, m, n, k):
    check(layer(m, n, k, 4, FP32, device), RECOMPUTE)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_fp32_factors_beside_16_bit_activations(device, dtype, design):
    check(layer(20, 40, 64, 8, dtype, device, factor_dtype=FP32), design)


@pytest.mark.parametrize("design", DESIGNS)
def test_transposed_weight_and_factors(device, design):
    arguments = layer(20, 40, 64, 8, FP16, device)
    for name in ("weight", "shrink", "d_shrink", "expand", "d_expand"):
        arguments[name] = arguments[name].t().contiguous().t()
    check(arguments, design)


def test_arbitrary_strides(device):
    arguments = layer(20, 40, 64, 8, FP32, device)
    for name, tensor in arguments.items():
        holes = torch.zeros([2 * size for size in tensor.shape], device=device)[
            tuple([slice(None, None, 2)] * tensor.ndim)
        ]
        arguments[name] = holes.copy_(tensor)
        assert not arguments[name].is_contiguous()
    check(arguments, RECOMPUTE)


@pytest.mark.parametrize("design", DESIGNS)
def test_without_bias(device, design):
    check({**layer(20, 40, 64, 8, FP16, device), "bias": None}, design)


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("design", DESIGNS)
def test_dropout_masks_the_shrink_forward_and_the_update_backward(device, design, adjoint, short):
    seed = torch.tensor(2**31 - 5, device=device)
    check(layer(20, 40, 64, 8, FP32, device, short=short), design, dropout_p=0.4, seed=seed, adjoint=adjoint)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_mask_is_the_references_bit_for_bit(device, design):
    m, k = 37, 64
    seed = torch.tensor(123456789, device=device)
    eye = torch.eye(k, device=device)  # u is then x' itself, and every term of its sum but one is zero
    zero = torch.zeros(k, k, device=device)
    ones = torch.ones(m, k, device=device)
    _, u, _ = linearized_lora_linear(ones, zero, None, eye, None, None, zero, 1.0, 0.3, seed, config=design)
    assert torch.equal(u != 0, reference.keep_mask(m, k, 0.3, seed))


@pytest.mark.parametrize("design", DESIGNS)
def test_one_kernel_is_its_own_backward(device, design):
    a = layer(20, 40, 64, 8, FP32, device)
    seed = torch.tensor(77, device=device)
    x = a["x"].clone().requires_grad_()
    y = reference.linearized_lora_linear(
        x, a["weight"], None, a["shrink"], a["expand"], a["d_shrink"], a["d_expand"], 0.5, dropout_p=0.25, seed=seed
    )
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, g)
    dx, _, _ = linearized_lora_linear(
        g, a["weight"].t(), None, a["expand"].t(), a["d_expand"].t(), a["shrink"].t(), a["d_shrink"].t(), 0.5,
        0.25, seed, adjoint=True, save=False, config=design,
    )  # fmt: skip
    assert_close("dx", dx, expected.double())


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("design", DESIGNS)
def test_without_save_only_y_is_returned(device, design, short):
    arguments = layer(20, 40, 64, 8, FP32, device, short=short)
    y, u, c = linearized_lora_linear(**arguments, scaling=0.7, save=False, config=design)
    assert u.shape == c.shape == (20, 0)
    assert_close("y", y, oracle.linearized_lora_linear(**arguments, scaling=0.7)[0])


def test_empty_sides(device):
    y, u, c = linearized_lora_linear(**layer(0, 40, 64, 8, FP32, device), scaling=1.0)
    assert y.shape == (0, 40)
    assert u.shape == c.shape == (0, 8)
    no_input = layer(5, 40, 0, 8, FP32, device)
    y, u, c = linearized_lora_linear(**no_input, scaling=1.0)
    assert torch.equal(y, no_input["bias"].expand(5, 40))
    assert not u.any()
    assert not c.any()
    y, u, _ = linearized_lora_linear(**(no_output := layer(5, 0, 64, 8, FP32, device)), scaling=1.0)
    assert y.shape == (5, 0)
    assert_close("u", u, no_output["x"].double() @ no_output["shrink"].double().t())


@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_flags_return_to_zero_and_launches_repeat(device, programs):
    config = dataclasses.replace(FLAGS, programs=programs)
    arguments = layer(75, 72, 64, 40, FP16, device)
    first, second = (linearized_lora_linear(**arguments, scaling=0.7, config=config) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert not any(buffer.any() for buffer in counters._buffers.values())


def test_both_designs_agree(device):
    arguments = layer(37, 72, 64, 8, FP32, device)
    y, *_ = linearized_lora_linear(**arguments, scaling=0.7, config=RECOMPUTE)
    shared, *_ = linearized_lora_linear(**arguments, scaling=0.7, config=FLAGS)
    assert_close("y", y, shared.double(), 1e-6)


def test_flags_refuse_what_descriptors_cannot_read(device):
    with pytest.raises(ValueError, match="16-byte aligned rows"):
        linearized_lora_linear(**layer(20, 29, 64, 8, FP16, device), scaling=1.0, config=FLAGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 64)}, "x is 2-D"),
        ({"x": torch.zeros(20, 64, dtype=torch.float64)}, "x is fp32, fp16 or bf16"),
        ({"weight": torch.zeros(40, 63)}, r"weight is \(40, 64\) here, got \(40, 63\)"),
        ({"d_expand": torch.zeros(40, 7)}, r"d_expand is \(40, 8\)"),
        ({"bias": torch.zeros(39)}, r"bias is \(40,\)"),
        ({"expand": None}, "come together"),
        ({"shrink": torch.zeros(257, 64)}, "rank 257"),
        ({"weight": torch.zeros(40, 64, dtype=torch.float16)}, "weight is torch.float32"),
        ({"dropout_p": 0.5}, "dropout needs a seed"),
        ({"dropout_p": 1.0}, r"in \[0, 1\)"),
        ({"dropout_p": 0.5, "seed": torch.zeros(1, dtype=torch.int64)}, "0-d int64"),
    ],
)
def test_refuses_loudly(device, change, message):
    change = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        linearized_lora_linear(**{**layer(20, 40, 64, 8, FP32, device), "scaling": 1.0, **change})


def test_compiles_without_a_graph_break(device):
    arguments = layer(5, 24, 32, 4, FP32, device)
    compiled = torch.compile(lambda **a: kernels.linearized_lora_linear(**a), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        compiled(**arguments, scaling=0.7), oracle.linearized_lora_linear(**arguments, scaling=0.7), strict=True
    ):
        assert_close("output", actual, expected)
