"""linear: the two streams of a frozen layer against torch.func.jvp of F.linear in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_oracles import assert_close, wide
from linlora.kernels.configs import Config

from linlora import kernels

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Tiles small enough that odd little matrices have several of them in every direction.
TILES = Config("tiles", 16, 32, 32, 0, 4, 2, group_m=2)


def arguments_of(m, n, k, dtype, device) -> dict:
    shapes = {"x": (m, k), "x_tangent": (m, k), "weight": (n, k), "bias": (n,)}
    return {name: (torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(device, dtype) for name, shape in shapes.items()}


def check(arguments: dict, config: Config | None = TILES) -> None:
    outputs = kernels.linear(**arguments, config=config)
    x, x_tangent, weight, bias = wide(*(arguments[name] for name in ("x", "x_tangent", "weight", "bias")))
    expected = torch.func.jvp(lambda x: F.linear(x, weight, bias), (x,), (x_tangent,))
    for name, actual, wanted in zip(("y", "y_tangent"), outputs, expected, strict=True):
        assert actual.dtype == arguments["x"].dtype
        assert_close(name, actual, wanted)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_the_formula(device, dtype):
    check(arguments_of(37, 72, 96, dtype, device))


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_the_tables_own_configurations(device, dtype, m):
    check(arguments_of(m, 72, 136, dtype, device), None)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 29, 17), (5, 130, 96), (37, 29, 17), (37, 1, 1)])
def test_odd_sizes(device, m, n, k):
    check(arguments_of(m, n, k, FP32, device))


def test_without_bias(device):
    check({**arguments_of(20, 40, 64, FP16, device), "bias": None})


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_fp32_bias_beside_16_bit_activations(device, dtype):
    arguments = arguments_of(20, 40, 64, dtype, device)
    check({**arguments, "bias": arguments["bias"].float()})


def test_transposed_weight(device):
    arguments = arguments_of(20, 40, 64, FP16, device)
    check({**arguments, "weight": arguments["weight"].t().contiguous().t()})


def test_arbitrary_strides(device):
    arguments = arguments_of(20, 40, 64, FP32, device)
    for name, tensor in arguments.items():
        arguments[name] = torch.stack([tensor, tensor + 1], -1)[..., 0]
        assert not arguments[name].is_contiguous()
    check(arguments)


def test_empty_sides(device):
    for m, n in ((0, 40), (5, 0)):
        y, y_tangent = kernels.linear(**arguments_of(m, n, 64, FP32, device))
        assert y.shape == y_tangent.shape == (m, n)
    no_input = arguments_of(5, 40, 0, FP32, device)
    y, y_tangent = kernels.linear(**no_input)
    assert torch.equal(y, no_input["bias"].expand(5, 40))
    assert not y_tangent.any()


def test_repeats_to_the_bit(device):
    arguments = arguments_of(37, 72, 96, FP16, device)
    for one, other in zip(*(kernels.linear(**arguments) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 64)}, r"x is 2-D \(rows, features\), got \(2, 3, 64\)"),
        ({"x": torch.zeros(20, 64, dtype=torch.float64)}, "x is fp32, fp16 or bf16, got torch.float64"),
        ({"x_tangent": None}, "x_tangent is None; linear needs both streams"),
        ({"x_tangent": torch.zeros(19, 64)}, r"x_tangent is \(20, 64\) here, got \(19, 64\)"),
        ({"x_tangent": torch.zeros(20, 64, dtype=FP16)}, "x_tangent is torch.float32 .* got torch.float16"),
        ({"weight": torch.zeros(40)}, r"weight is 2-D \(N, 64\), got \(40,\)"),
        ({"weight": torch.zeros(40, 63)}, r"weight is \(40, 64\) here, got \(40, 63\)"),
        ({"bias": torch.zeros(39)}, r"bias is \(40,\) here, got \(39,\)"),
    ],
)
def test_refuses_loudly(device, change, message):
    change = {key: value if value is None else value.to(device) for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        kernels.linear(**{**arguments_of(20, 40, 64, FP32, device), **change})
