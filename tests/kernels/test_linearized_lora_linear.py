"""Layer scope: both designs against the formulas in float64."""

import dataclasses

import kernel_oracles as oracle
import pytest
import torch
from kernel_oracles import FLAGS, RECOMPUTE, SHARED, assert_close, assert_result, dropped, layer
from linlora.kernels import counters
from linlora.kernels.device import DeviceTraits
from linlora.kernels.launch import configuration
from linlora.kernels.linearized_lora_linear import host
from linlora.kernels.packing import pack, present
from linlora.kernels.problem import LoraLinear
from triton.runtime.interpreter import interpreter_builder

from linlora import kernels, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DESIGNS = [pytest.param(RECOMPUTE, id="recompute"), pytest.param(FLAGS, id="flags")]
FORMS = [pytest.param(False, id="pair"), pytest.param(True, id="short")]


def check(problem: LoraLinear, config, save: bool = True) -> None:
    assert_result(host(problem, save=save, config=config), oracle.lora_linear(problem), save)


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
    check(dropped(layer(20, 40, 72, rank, dtype, device, short=short), seed=7, adjoint=adjoint), RECOMPUTE)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 29, 17), (5, 130, 96), (37, 29, 17), (37, 130, 1)])
def test_odd_sizes(device, m, n, k):
    check(layer(m, n, k, 4, FP32, device), RECOMPUTE)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_fp32_factors_beside_16_bit_activations(device, dtype, design):
    check(layer(20, 40, 64, 8, dtype, device, factor_dtype=FP32), design)


@pytest.mark.parametrize("design", DESIGNS)
def test_transposed_weight_and_factors(device, design):
    problem = layer(20, 40, 64, 8, FP16, device)
    names = ("weight", "shrink", "expand", "d_shrink", "d_expand")
    check(problem._replace(**{name: getattr(problem, name).t().contiguous().t() for name in names}), design)


def test_arbitrary_strides(device):
    problem = layer(20, 40, 64, 8, FP32, device)
    for name in ("x", "weight", "bias", "shrink", "expand", "d_shrink", "d_expand"):
        tensor = getattr(problem, name)
        holes = torch.zeros([2 * size for size in tensor.shape], device=device)[
            tuple([slice(None, None, 2)] * tensor.ndim)
        ]
        assert not holes.is_contiguous()
        problem = problem._replace(**{name: holes.copy_(tensor)})
    check(problem, RECOMPUTE)


@pytest.mark.parametrize("scaling", [48.0, -3.0, 0.0])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_large_scaling_does_not_overflow(device, design, scaling):
    """u and c reach some 20,000 in float16, of which s u would be infinite; y is small."""
    problem = layer(20, 40, 64, 8, FP16, device)
    u = (problem.x.float() @ problem.shrink.float().t()).abs().max()
    wide, narrow = 2.0 ** (20000 / u).log2().floor(), 2.0**-14
    problem = problem._replace(
        shrink=problem.shrink * wide, d_shrink=problem.d_shrink * wide / 4,
        expand=problem.expand * narrow, d_expand=problem.d_expand * narrow, scaling=scaling,
    )  # fmt: skip
    assert host(problem, config=design).u.abs().max() > 10000
    check(problem, design)


@pytest.mark.parametrize("design", DESIGNS)
def test_without_bias(device, design):
    check(layer(20, 40, 64, 8, FP16, device)._replace(bias=None), design)


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize("design", DESIGNS)
def test_dropout_masks_the_shrink_forward_and_the_update_backward(device, design, adjoint, short):
    check(dropped(layer(20, 40, 64, 8, FP32, device, short=short), seed=2**31 - 5, adjoint=adjoint), design)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_mask_is_the_references_bit_for_bit(device, design):
    m, k = 37, 64
    seed = torch.tensor(123456789, device=device)
    eye = torch.eye(k, device=device)  # u is then x' itself, and every term of its sum but one is zero
    zero = torch.zeros(k, k, device=device)
    ones = torch.ones(m, k, device=device)
    result = host(LoraLinear(ones, zero, None, eye, None, None, zero, 1.0, None, 0.3, seed), config=design)
    assert torch.equal(result.u != 0, reference.keep_mask(m, k, 0.3, seed))


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("design", DESIGNS)
def test_one_kernel_is_its_own_backward(device, design, short):
    problem = dropped(layer(20, 40, 64, 8, FP32, device, short=short), seed=77, p=0.25)
    x = problem.x.clone().requires_grad_()
    y = reference.linearized_lora_linear(x, *problem[1:8], dropout_p=problem.dropout_p, seed=problem.seed)
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, g)
    assert_close("dx", host(problem.adjoint(g), save=False, config=design).y, expected.double())


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("design", DESIGNS)
def test_without_save_only_y_is_returned(device, design, short):
    check(layer(20, 40, 64, 8, FP32, device, short=short), design, save=False)


def test_empty_sides(device):
    y, _, u, c = host(layer(0, 40, 64, 8, FP32, device))
    assert y.shape == (0, 40)
    assert u.shape == c.shape == (0, 8)
    no_input = layer(5, 40, 0, 8, FP32, device)
    y, _, u, c = host(no_input)
    assert torch.equal(y, no_input.bias.expand(5, 40))
    assert not u.any()
    assert not c.any()
    y, _, u, _ = host(no_output := layer(5, 0, 64, 8, FP32, device))
    assert y.shape == (5, 0)
    assert_close("u", u, no_output.x.double() @ no_output.shrink.double().t())


@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_flags_return_to_zero_and_launches_repeat(device, programs):
    config = dataclasses.replace(FLAGS, programs=programs)
    problem = layer(75, 72, 64, 40, FP16, device)
    first, second = (present(host(problem, config=config)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert not any(buffer.any() for buffer in counters._buffers.values())


def test_both_designs_agree(device):
    problem = layer(37, 72, 64, 8, FP32, device)
    y, shared = host(problem, config=RECOMPUTE).y, host(problem, config=FLAGS).y
    assert_close("y", y, shared.double(), 1e-6)


def test_flags_refuse_what_descriptors_cannot_read(device):
    with pytest.raises(ValueError, match="16-byte aligned rows"):
        host(layer(20, 29, 64, 8, FP16, device), config=FLAGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 64)}, "x is 2-D"),
        ({"x": torch.zeros(20, 64, dtype=torch.float64)}, "x is fp32, fp16 or bf16"),
        ({"weight": torch.zeros(40, 63)}, r"weight \(40, 63\) takes 63"),
        ({"d_expand": torch.zeros(40, 7)}, r"dB \(40, 8\) are expected, got .* dB \(40, 7\)"),
        ({"bias": torch.zeros(39)}, r"bias \(40,\) is expected"),
        ({"bias": torch.zeros(40, dtype=torch.float64)}, "bias is torch.float32"),
        ({"d_shrink": None}, "dA is missing"),
        (
            {
                "shrink": torch.zeros(257, 64), "expand": None, "d_shrink": None, "d_expand": torch.zeros(40, 257),
            },
            "rank 257",
        ),
        ({"weight": torch.zeros(40, 64, dtype=torch.float16)}, "weight is torch.float16: cast"),
        ({"dropout_p": 0.5}, "dropout needs a seed"),
        ({"dropout_p": 1.0}, "a probability below 1"),
        ({"dropout_p": 0.5, "seed": torch.zeros(1, dtype=torch.int64)}, "0-d int64"),
    ],
)  # fmt: skip
def test_refuses_loudly(device, change, message):
    change = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        host(layer(20, 40, 64, 8, FP32, device)._replace(**change))


@pytest.mark.parametrize("save", [True, False], ids=["saves", "y-alone"])
def test_compiles_without_a_graph_break(device, save):
    problem = layer(5, 24, 32, 4, FP32, device)
    compiled = torch.compile(lambda p: kernels.lora_linear(p, save=save), fullgraph=True, backend="aot_eager")
    assert_result(compiled(problem), oracle.lora_linear(problem), save)


def test_the_operator_keeps_the_rules_of_custom_operators(device):
    tensors, numbers = pack(layer(5, 24, 32, 4, FP32, device, short=True))
    torch.library.opcheck(torch.ops.linlora.lora_linear, (tensors, *numbers, True, True, "num_stages+1"))


@pytest.mark.parametrize("short", FORMS)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize(("dtype", "rank"), [(FP32, 8), (FP16, 80), (BF16, 8)], ids=str)
def test_programs_that_share_a_tile(device, dtype, rank, adjoint, short):
    problem = layer(5, 40, 72, rank, dtype, device, factor_dtype=FP32, short=short)
    check(dropped(problem, seed=7, adjoint=adjoint), SHARED)
    check(problem, SHARED, save=False)


@pytest.mark.parametrize("splits", [3, 8])  # the last of 8 have no step of K left
def test_programs_share_a_tile_in_a_fixed_order(device, splits, monkeypatch):
    """Counters are back at zero after a launch, and another order of the programs gives the same bits."""
    config, problem = dataclasses.replace(RECOMPUTE, splits=splits), layer(5, 40, 130, 80, FP16, device)
    first = host(problem, config=config)
    assert_result(first, oracle.lora_linear(problem))
    tiles = counters.counters(torch.device(device), 1)
    assert not tiles.any()
    builder, place = interpreter_builder, interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        builder, "set_grid_idx", lambda x, y, z: place(builder.grid_dim[0] - 1 - x, y, z)
    )  # the last first
    again = host(problem, config=config)
    assert all(torch.equal(a, b) for a, b in zip(present(first), present(again), strict=True))
    assert not tiles.any()


def test_few_rows_share_their_tiles_by_themselves(device, monkeypatch):
    monkeypatch.setattr("linlora.kernels.launch.device_traits", lambda device: DeviceTraits(90, 132))
    problem = layer(5, 72, 1024, 8, FP16, device)
    config = configuration(problem)
    assert (config.block_m, config.splits) == (16, 2)
    assert_result(host(problem), oracle.lora_linear(problem))
