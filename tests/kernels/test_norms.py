"""The norms on two streams against torch.func.jvp, and their backward against autograd, of torch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_oracles import assert_close, wide
from linlora.kernels.configs import Config
from linlora.kernels.norm_problem import Norm, NormResult

from linlora import kernels

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROWS = Config("rows", 2, 128, 0, 0, 4, 1)
BLOCKS = Config("rows", 2, 32, 0, 0, 4, 1)  # several blocks to a row
EPS = 1e-3
NORMS = ["layer", "rms"]


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with a hole after each."""
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


def arguments_of(m, n, dtype, device, weight_dtype=None) -> dict:
    arguments = {"x": 3 * torch.randn(m, n) + 1, "x_tangent": torch.randn(m, n), "g": torch.randn(m, n)}
    arguments = {name: tensor.to(device, dtype) for name, tensor in arguments.items()}
    vectors = {"weight": torch.randn(n) + 1, "bias": torch.randn(n)}
    return {**arguments, **{name: vector.to(device, weight_dtype or dtype) for name, vector in vectors.items()}}


def problem(norm: str, arguments: dict, eps=EPS) -> Norm:
    centered = norm == "layer"
    bias = arguments["bias"] if centered else None
    return Norm(arguments["x"], arguments["x_tangent"], arguments["weight"], bias, eps, centered)


def forward(norm: str, arguments: dict, config=ROWS, eps=EPS) -> tuple:
    """(y, y_tangent, statistics)."""
    y, y_tangent, mean, rstd = kernels.norm(problem(norm, arguments, eps), config=config)
    return y, y_tangent, [rstd] if mean is None else [mean, rstd]


def backward(norm: str, arguments: dict, statistics, config=ROWS) -> torch.Tensor:
    *mean, rstd = statistics
    result = NormResult(None, None, *(mean or [None]), rstd)
    return kernels.norm_backward(problem(norm, arguments), arguments["g"], result, config=config)


def check(norm: str, arguments: dict, config: Config | None = ROWS, eps: float = EPS) -> None:
    y, y_tangent, statistics = forward(norm, arguments, config, eps)
    x, x_tangent, g, weight, bias = wide(*(arguments[name] for name in ("x", "x_tangent", "g", "weight", "bias")))

    def oracle(x: torch.Tensor) -> torch.Tensor:
        if norm == "layer":
            return F.layer_norm(x, x.shape[1:], weight, bias, eps)
        return F.rms_norm(x, x.shape[1:], weight, eps)

    tangent = torch.zeros_like(x) if x_tangent is None else x_tangent
    expected, expected_tangent = torch.func.jvp(oracle, (x,), (tangent,))
    assert y.dtype == arguments["x"].dtype
    assert_close("y", y, expected)
    assert (y_tangent is None) == (x_tangent is None)
    if y_tangent is not None:
        assert y_tangent.dtype == y.dtype
        assert_close("y_tangent", y_tangent, expected_tangent)

    centered = x - x.mean(1, keepdim=True) if norm == "layer" else x
    expected_statistics = [((centered**2).mean(1) + eps).rsqrt()]
    if norm == "layer":
        expected_statistics.insert(0, x.mean(1))
    for actual, wanted in zip(statistics, expected_statistics, strict=True):
        assert actual.dtype == FP32
        assert_close("statistic", actual, wanted)

    (expected_dx,) = torch.func.vjp(oracle, x)[1](g)
    dx = backward(norm, arguments, statistics, config)
    assert dx.dtype == arguments["x"].dtype
    assert_close("dx", dx, expected_dx)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("config", [pytest.param(ROWS, id="one-block"), pytest.param(BLOCKS, id="blocks")])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_the_formula(device, dtype, config, norm):
    check(norm, arguments_of(5, 100, dtype, device), config)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("m", "n"), [(1, 3), (3, 17), (4, 100), (37, 300), (3, 5000)])
def test_odd_sizes_in_the_tables_own_configurations(device, m, n, norm):
    check(norm, arguments_of(m, n, FP32, device), None)


def test_a_row_that_does_not_fit_in_registers(device):
    check("layer", arguments_of(1, 16390, FP16, device), None)


def test_one_feature(device):
    arguments = arguments_of(5, 1, FP32, device)
    check("rms", arguments)
    y, y_tangent, statistics = forward("layer", arguments)
    assert torch.equal(y, arguments["bias"].expand(5, 1))
    assert not y_tangent.any()
    assert not backward("layer", arguments, statistics).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_fp32_weights_beside_16_bit_activations(device, dtype, norm):
    check(norm, arguments_of(5, 40, dtype, device, weight_dtype=FP32))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("left_out", [("x_tangent",), ("weight",), ("bias",), ("x_tangent", "weight", "bias")], ids=str)
def test_arguments_left_out(device, left_out, norm):
    check(norm, {**arguments_of(5, 40, FP32, device), **dict.fromkeys(left_out)})


@pytest.mark.parametrize("norm", NORMS)
def test_arbitrary_strides(device, norm):
    check(norm, {name: strided(tensor) for name, tensor in arguments_of(5, 40, FP32, device).items()})
    transposed = arguments_of(5, 40, FP32, device)
    for name in ("x", "x_tangent", "g"):
        transposed[name] = transposed[name].t().contiguous().t()
    check(norm, transposed)


def test_statistics_may_be_strided(device):
    arguments = arguments_of(5, 40, FP32, device)
    *_, statistics = forward("layer", arguments)
    expected = backward("layer", arguments, statistics)
    assert torch.equal(backward("layer", arguments, [strided(statistic) for statistic in statistics]), expected)


def test_a_large_mean_does_not_cancel_the_variance(device):
    arguments = arguments_of(5, 300, FP32, device)
    arguments["x"] = (arguments["x"].double() + 4096.0).to(FP32)  # E[x²] − E[x]² would keep one digit of the variance
    y, y_tangent, _ = forward("layer", arguments)
    x, x_tangent, weight, bias = wide(*(arguments[name] for name in ("x", "x_tangent", "weight", "bias")))
    expected, tangent = torch.func.jvp(lambda x: F.layer_norm(x, (300,), weight, bias, EPS), (x,), (x_tangent,))
    assert_close("y", y, expected, 1e-3)
    assert_close("y_tangent", y_tangent, tangent, 1e-3)


def test_rounds_once(device):
    x = torch.randn(8, 64).to(device, FP16)
    weight = torch.randn(64).to(device, FP16)
    y, *_ = kernels.norm(Norm(x, None, weight, None, EPS, centered=False), config=ROWS)
    expected = F.rms_norm(x.double(), (64,), weight.double(), EPS).to(FP16)
    assert (y != expected).float().mean() < 0.01  # only where fp32 lands on the other side of a midpoint


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows(device, norm):
    arguments = arguments_of(0, 40, FP32, device)
    y, y_tangent, statistics = forward(norm, arguments)
    assert y.shape == y_tangent.shape == backward(norm, arguments, statistics).shape == (0, 40)
    assert all(statistic.shape == (0,) for statistic in statistics)


@pytest.mark.parametrize("norm", NORMS)
def test_repeats_to_the_bit(device, norm):
    arguments = arguments_of(37, 300, FP16, device)
    (y, y_tangent, statistics), again = (forward(norm, arguments, None) for _ in range(2))
    assert torch.equal(y, again[0])
    assert torch.equal(y_tangent, again[1])
    assert torch.equal(backward(norm, arguments, statistics, None), backward(norm, arguments, statistics, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 40)}, r"x is 2-D \(rows, features\), got \(2, 3, 40\)"),
        ({"x": torch.zeros(5, 40, dtype=torch.float64)}, "x is fp32, fp16 or bf16, got torch.float64"),
        ({"x": torch.zeros(5, 0)}, r"x has features to normalise over, got \(5, 0\)"),
        ({"x_tangent": torch.zeros(4, 40)}, r"x_tangent is \(5, 40\) here, got \(4, 40\)"),
        ({"weight": torch.zeros(39)}, r"weight is \(40,\) here, got \(39,\)"),
        ({"weight": torch.zeros(40, dtype=FP16)}, "weight is torch.float32 .* got torch.float16"),
        ({"bias": torch.zeros(1, 40)}, r"bias is \(40,\) here, got \(1, 40\)"),
    ],
)
def test_forward_refuses_loudly(device, change, message):
    change = {key: value.to(device) for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        forward("layer", {**arguments_of(5, 40, FP32, device), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.zeros(4, 40)}, r"g is \(5, 40\) here, got \(4, 40\)"),
        ({"mean": torch.zeros(4)}, r"mean is \(5,\) here, got \(4,\)"),
        ({"rstd": torch.zeros(5, dtype=FP16)}, "rstd is torch.float32, .* got torch.float16"),
    ],
)
def test_backward_refuses_loudly(device, change, message):
    arguments = arguments_of(5, 40, FP32, device)
    given = {"g": arguments["g"], "mean": torch.zeros(5, device=device), "rstd": torch.ones(5, device=device)}
    given |= {key: value.to(device) for key, value in change.items()}
    result = NormResult(None, None, given["mean"], given["rstd"])
    with pytest.raises(ValueError, match=message):
        kernels.norm_backward(problem("layer", arguments), given["g"], result)
