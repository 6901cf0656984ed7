"""The activations on two streams against torch.func.jvp, and their backward against autograd, in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_oracles import assert_close, wide
from linlora.kernels.activations import launch_gated
from linlora.kernels.configs import Config

from linlora import kernels

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ELEMENTS = Config("elements", 0, 64, 0, 0, 4, 1)
ORACLES = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
KINDS = list(ORACLES)
DTYPES = [FP32, FP16, BF16]


def randn(*shape: int, dtype=FP32, device="cpu") -> torch.Tensor:
    return (2 * torch.randn(shape)).to(device, dtype)


def check(kind, x, x_tangent, g, config=ELEMENTS) -> None:
    y, y_tangent = kernels.activation(x, x_tangent, kind, config=config)
    dx = kernels.activation_backward(g, x, kind, config=config)
    assert y.dtype == y_tangent.dtype == dx.dtype == x.dtype
    primal, tangent, cotangent = wide(x, x_tangent, g)
    zero = torch.zeros_like(primal)
    expected, expected_tangent = torch.func.jvp(ORACLES[kind], (primal,), (zero if tangent is None else tangent,))
    assert_close("y", y, expected)
    assert_close("y_tangent", y_tangent, torch.empty(0) if tangent is None else expected_tangent)
    assert_close("dx", dx, torch.func.vjp(ORACLES[kind], primal)[1](cotangent)[0])


def check_gated(kind, gate, gate_tangent, up, up_tangent, g, config=ELEMENTS) -> None:
    y, y_tangent = kernels.gated_activation(gate, gate_tangent, up, up_tangent, kind, config=config)
    gradients = kernels.gated_activation_backward(g, gate, up, kind, config=config)
    assert y.dtype == y_tangent.dtype == gradients[0].dtype == gradients[1].dtype == gate.dtype

    def oracle(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return ORACLES[kind](gate) * up

    primals, tangents, (cotangent,) = wide(gate, up), wide(gate_tangent, up_tangent), wide(g)
    filled = tuple(
        torch.zeros_like(primal) if tangent is None else tangent
        for primal, tangent in zip(primals, tangents, strict=True)
    )
    expected, expected_tangent = torch.func.jvp(oracle, primals, filled)
    assert_close("y", y, expected)
    assert_close("y_tangent", y_tangent, torch.empty(0) if tangents == (None, None) else expected_tangent)
    expected_gradients = torch.func.vjp(oracle, *primals)[1](cotangent)
    for name, actual, wanted in zip(("d_gate", "d_up"), gradients, expected_gradients, strict=True):
        assert_close(name, actual, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_formula(device, dtype, kind):
    check(kind, *(randn(5, 7, 13, dtype=dtype, device=device) for _ in range(3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_matches_the_formula(device, dtype, kind):
    check_gated(kind, *(randn(5, 7, 13, dtype=dtype, device=device) for _ in range(5)))


@pytest.mark.parametrize("shape", [(), (1,), (64,), (1025,), (3, 1, 1), (2, 3, 4, 5)], ids=str)
def test_any_shape_in_the_tables_own_configuration(device, shape):
    check("gelu", *(randn(*shape, device=device) for _ in range(3)), config=None)
    check_gated("silu", *(randn(*shape, device=device) for _ in range(5)), config=None)


def test_without_tangents(device):
    x, g, up, tangent = (randn(5, 13, device=device) for _ in range(4))
    check("gelu", x, None, g)
    check_gated("gelu", x, None, up, None, g)
    check_gated("gelu", x, tangent, up, None, g)
    check_gated("gelu", x, None, up, tangent, g)


def test_halves_of_one_projection_are_not_copied(device):
    fused, tangent = (randn(3, 5, 2 * 40, device=device) for _ in range(2))
    (gate, up), (gate_tangent, up_tangent) = fused.chunk(2, -1), tangent.chunk(2, -1)
    check_gated("silu", gate, gate_tangent, up, up_tangent, randn(3, 5, 40, device=device))
    y = torch.empty(3, 5, 40, device=device)
    arguments = launch_gated(gate, gate_tangent, up, up_tangent, y, y, "silu", ELEMENTS).arguments
    assert arguments["gate"].pointer.data_ptr() == gate.data_ptr()
    assert arguments["up_tangent"].pointer.data_ptr() == up_tangent.data_ptr()
    assert arguments["y"].pointer.data_ptr() == y.data_ptr()


@pytest.mark.parametrize("permutation", [(0, 2, 1), (2, 1, 0), (1, 0, 2)], ids=str)
def test_permuted_dimensions(device, permutation):
    tensors = [randn(3, 5, 7, device=device).permute(permutation) for _ in range(4)]
    x, *others = tensors
    check("gelu", *tensors[:3])
    check_gated("gelu", x.contiguous(), *others, randn(*x.shape, device=device))


def test_holes_and_broadcasts(device):
    holes = randn(6, 10, 2, device=device)[..., 0]
    broadcast = randn(6, 1, device=device).expand(6, 10)
    check("silu", holes, broadcast, randn(6, 10, device=device))
    check("silu", broadcast, holes, holes[:1].expand(6, 10))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, in exp(-x) and x²: infinity serves there
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_large_number_gives_nan(device, dtype, kind):
    largest, smallest = torch.finfo(dtype).max, 4 * torch.finfo(dtype).tiny
    positive = torch.tensor([smallest, 20.0, 100.0, 1e4, largest], device=device).to(dtype)
    at_zero = 1.0 if kind == "relu" else 0.5
    y, y_tangent = kernels.activation(positive, torch.ones_like(positive), kind)
    assert torch.equal(y[1:], positive[1:])
    assert torch.equal(y[0], at_zero * positive[0])
    assert torch.equal(y_tangent[1:], torch.ones_like(y_tangent[1:]))
    assert y_tangent[0] == at_zero
    y, y_tangent = kernels.activation(-positive, torch.ones_like(positive), kind)
    assert y[1:].abs().max() < 1e-6
    assert y_tangent[1:].abs().max() < 1e-6


def test_relu_of_infinities_and_nan(device):
    x = torch.tensor([-torch.inf, torch.inf, torch.nan], device=device)
    y, y_tangent = kernels.activation(x, torch.ones_like(x), "relu")
    assert torch.equal(y[:2], F.relu(x[:2]))
    assert y[2].isnan()
    assert torch.equal(y_tangent[:2].cpu(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_empty(device, shape, kind):
    x = randn(*shape, device=device)
    outputs = (
        *kernels.activation(x, x, kind),
        kernels.activation_backward(x, x, kind),
        *kernels.gated_activation(x, x, x, x, kind),
        *kernels.gated_activation_backward(x, x, x, kind),
    )
    assert all(output.shape == shape for output in outputs)


def test_repeats_to_the_bit(device):
    tensors = [randn(37, 29, device=device) for _ in range(4)]
    for one, other in zip(*(kernels.gated_activation(*tensors, "gelu") for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mish"}, "kind is one of gelu, gelu_tanh, silu, relu, got 'mish'"),
        ({"gate": torch.zeros(3, 4, dtype=torch.float64)}, "gate is fp32, fp16 or bf16, got torch.float64"),
        ({"up": torch.zeros(4, 3)}, r"up is \(3, 4\) here, got \(4, 3\)"),
        ({"up_tangent": torch.zeros(3, 4, dtype=FP16)}, "up_tangent is torch.float32 .* got torch.float16"),
        ({"gate_tangent": torch.zeros(4)}, r"gate_tangent is \(3, 4\) here, got \(4,\)"),
    ],
)
def test_refuses_loudly(device, change, message):
    like = torch.zeros(3, 4)
    arguments = {"gate": like, "gate_tangent": None, "up": like, "up_tangent": None, "kind": "silu", **change}
    arguments = {key: a.to(device) if isinstance(a, torch.Tensor) else a for key, a in arguments.items()}
    with pytest.raises(ValueError, match=message):
        kernels.gated_activation(**arguments)
    with pytest.raises(ValueError, match=r"g is \(4,\) here, got \(3, 4\)"):
        kernels.activation_backward(like.to(device), torch.zeros(4, device=device), "silu")
