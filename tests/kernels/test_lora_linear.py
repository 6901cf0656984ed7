"""A LoRA layer, in one stream (by both designs) and in two, against the formulas in float64."""

import dataclasses

import kernel_oracles as oracle
import pytest
import torch
from kernel_oracles import FLAGS, RECOMPUTE, SHARED, assert_close, assert_result, dropped, layer
from linlora.kernels import counters
from linlora.kernels.device import DeviceTraits
from linlora.kernels.launch import configuration
from linlora.kernels.lora_linear import host
from linlora.kernels.packing import pack, present
from linlora.kernels.problem import LoraLinear
from triton.runtime.interpreter import interpreter_builder

from linlora import kernels, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ONE, FLAGGED, TWO = (
    pytest.param(RECOMPUTE, False, id="one-stream"), pytest.param(FLAGS, False, id="flags"),
    pytest.param(RECOMPUTE, True, id="two-streams"),
)  # fmt: skip
every_design = pytest.mark.parametrize(("design", "two_streams"), [ONE, FLAGGED, TWO])
both_streams = pytest.mark.parametrize(("design", "two_streams"), [ONE, TWO])
both_forms = pytest.mark.parametrize("short", [False, True], ids=["pair", "short"])
both_sides = pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])


def check(problem: LoraLinear, config, save: bool = True, primal: bool = True) -> None:
    result = host(problem, save=save, primal=primal, config=config)
    assert_result(result, oracle.lora_linear(problem), save, primal)


@both_forms
@every_design
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_the_formula(device, dtype, design, two_streams, short):
    check(layer(37, 72, 96, 16, dtype, device, short=short, two_streams=two_streams), design)


@pytest.mark.parametrize("rank", [1, 33, 64, 256])
@every_design
def test_every_rank(device, design, two_streams, rank):
    check(layer(5, 40, 32, rank, FP16, device, two_streams=two_streams), design)


@both_forms
@both_sides
@both_streams
@pytest.mark.parametrize(("dtype", "rank"), [(FP32, 65), (FP16, 100), (BF16, 130)], ids=str)
def test_several_blocks_of_ranks(device, dtype, rank, design, two_streams, adjoint, short):
    assert rank > design.block_r
    problem = layer(20, 40, 72, rank, dtype, device, short=short, two_streams=two_streams)
    check(dropped(problem, seed=7, adjoint=adjoint), design)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 29, 17), (5, 130, 96), (37, 29, 17), (37, 130, 1)])
@both_streams
def test_odd_sizes(device, m, n, k, design, two_streams):
    check(layer(m, n, k, 4, FP32, device, two_streams=two_streams), design)


@every_design
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_fp32_factors_beside_16_bit_activations(device, dtype, design, two_streams):
    check(layer(20, 40, 64, 8, dtype, device, factor_dtype=FP32, two_streams=two_streams), design)


@every_design
def test_transposed_weight_and_factors(device, design, two_streams):
    problem = layer(20, 40, 64, 8, FP16, device, two_streams=two_streams)
    names = ("weight", "shrink", "expand", "d_shrink", "d_expand")
    check(problem._replace(**{name: getattr(problem, name).t().contiguous().t() for name in names}), design)


@both_streams
def test_arbitrary_strides(device, design, two_streams):
    problem = layer(20, 40, 64, 8, FP32, device, two_streams=two_streams)
    for name, tensor in problem._asdict().items():
        if isinstance(tensor, torch.Tensor):
            shape, every_other = [2 * size for size in tensor.shape], (slice(None, None, 2),) * tensor.ndim
            holes = torch.zeros(shape, device=device)[every_other]
            assert not holes.is_contiguous()
            problem = problem._replace(**{name: holes.copy_(tensor)})
    check(problem, design)


@both_streams
def test_rows_that_are_one_and_the_same(device, design, two_streams):
    """Strides of zero, as autograd's expanded cotangents have them."""
    problem = layer(1, 40, 64, 8, FP32, device, two_streams=two_streams)
    rows = problem._replace(x=problem.x.expand(20, 64), bias=problem.bias[:1].expand(40))
    if two_streams:
        rows = rows._replace(x_tangent=rows.x_tangent.expand(20, 64))
    check(rows, design)


@pytest.mark.parametrize("primal", [True, False], ids=["primal", "tangent-only"])
@pytest.mark.parametrize("tangent", [True, False], ids=["x_t", "no-x_t"])
@both_forms
@pytest.mark.parametrize("rank", [8, 80])
def test_streams_left_out(device, rank, short, tangent, primal):
    problem = layer(20, 40, 64, rank, FP32, device, short=short, two_streams=True)._replace(bias=None)
    check(problem if tangent else problem._replace(x_tangent=None), RECOMPUTE, primal=primal)


@pytest.mark.parametrize("scaling", [48.0, -3.0, 0.0])
@every_design
def test_a_large_scaling_does_not_overflow(device, design, two_streams, scaling):
    """u and c reach some 20,000 in float16, of which s u would be infinite; y is small."""
    problem = layer(20, 40, 64, 8, FP16, device, two_streams=two_streams)
    u = (problem.x.float() @ problem.shrink.float().t()).abs().max()
    wide, narrow = 2.0 ** (20000 / u).log2().floor(), 2.0**-14
    problem = problem._replace(
        shrink=problem.shrink * wide, d_shrink=problem.d_shrink * wide / 4,
        expand=problem.expand * narrow, d_expand=problem.d_expand * narrow, scaling=scaling,
    )  # fmt: skip
    assert host(problem, config=design).u.abs().max() > 10000
    check(problem, design)


@pytest.mark.parametrize(("design", "two_streams"), [ONE, FLAGGED])
def test_without_bias(device, design, two_streams):
    check(layer(20, 40, 64, 8, FP16, device)._replace(bias=None), design)


@both_forms
@both_sides
@every_design
def test_dropout_masks_the_shrink_forward_and_the_updates_backward(device, design, two_streams, adjoint, short):
    problem = layer(20, 40, 64, 8, FP32, device, short=short, two_streams=two_streams)
    check(dropped(problem, seed=2**31 - 5, adjoint=adjoint), design)


@every_design
def test_the_mask_is_the_references_bit_for_bit(device, design, two_streams):
    m, k = 37, 64
    seed = torch.tensor(123456789, device=device)
    eye = torch.eye(k, device=device)  # u, or c by x_t, is then x' itself: every term of its sum but one is zero
    ones, zero = torch.ones(m, k, device=device), torch.zeros(k, k, device=device)
    problem = LoraLinear(ones, zero, None, eye, zero, zero, zero, 1.0, None, 0.3, seed)
    if two_streams:
        problem = problem._replace(x=0 * ones, x_tangent=ones, two_streams=True)
    result = host(problem, config=design)
    assert torch.equal(result.c != 0, reference.keep_mask(m, k, 0.3, seed))
    assert torch.equal(result.u != 0, torch.zeros_like(result.u) != 0 if two_streams else result.c != 0)


@both_forms
@every_design
def test_one_kernel_is_its_own_backward(device, design, two_streams, short):
    """Of two streams the adjoint's are swapped."""
    problem = dropped(layer(20, 40, 64, 8, FP32, device, short=short, two_streams=two_streams), seed=77, p=0.25)
    inputs = [x.clone().requires_grad_() for x in (problem.x, problem.x_tangent) if x is not None]
    formula = reference.lora_linear if two_streams else reference.linearized_lora_linear
    y = formula(inputs[0], *problem[1:8], *inputs[1:], dropout_p=problem.dropout_p, seed=problem.seed)
    outputs = y if two_streams else (y,)
    cotangents = [torch.randn_like(output) for output in outputs]
    expected = torch.autograd.grad(outputs, inputs, cotangents)
    result = host(problem.adjoint(*cotangents), save=False, config=design)
    found = (result.y_tangent, result.y) if two_streams else (result.y,)
    for name, dx, right in zip(("dx", "dx_tangent"), found, expected, strict=False):
        assert_close(name, dx, right.double())


@both_forms
@every_design
def test_without_save_no_low_rank_product_is_returned(device, design, two_streams, short):
    check(layer(20, 40, 64, 8, FP32, device, short=short, two_streams=two_streams), design, save=False)


@pytest.mark.parametrize("two_streams", [False, True], ids=["one-stream", "two-streams"])
def test_empty_sides(device, two_streams):
    of = lambda m, n, k: layer(m, n, k, 8, FP32, device, two_streams=two_streams)  # noqa: E731
    outputs = present(host(of(0, 40, 64)))
    assert [tuple(output.shape) for output in outputs] == [*[(0, 40)] * (1 + two_streams), (0, 8), (0, 8)]
    no_input = of(5, 40, 0)
    y, *others = present(host(no_input))
    assert torch.equal(y, no_input.bias.expand(5, 40))
    assert not any(other.any() for other in others)
    check(of(5, 0, 64), None)


@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_flags_return_to_zero_and_launches_repeat(device, programs):
    config = dataclasses.replace(FLAGS, programs=programs)
    problem = layer(75, 72, 64, 40, FP16, device)
    first, second = (present(host(problem, config=config)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert not any(buffer.any() for buffer in counters._buffers.values())


def test_designs_agree_and_repeat_to_the_bit(device):
    problem = layer(37, 72, 64, 8, FP32, device)
    first, again, shared = (host(problem, config=config).y for config in (RECOMPUTE, RECOMPUTE, FLAGS))
    assert torch.equal(first, again)
    assert_close("y", first, shared.double(), 1e-6)


def test_flags_refuse_two_streams(device):
    with pytest.raises(ValueError, match="the flags design computes one stream"):
        host(layer(64, 64, 64, 8, FP16, device, two_streams=True), config=FLAGS)


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
        (
            {"two_streams": True, "x_tangent": torch.zeros(19, 64)},
            r"x_tangent is expected like x, got x \(20, 64\), x_tangent \(19, 64\)",
        ),
    ],
)  # fmt: skip
def test_refuses_loudly(device, change, message):
    change = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        host(layer(20, 40, 64, 8, FP32, device)._replace(**change))


@pytest.mark.parametrize(("short", "two_streams", "save"), [(False, False, False), (True, True, True)])
def test_compiles_without_a_graph_break(device, short, two_streams, save):
    problem = layer(5, 24, 32, 4, FP32, device, short=short, two_streams=two_streams)
    compiled = torch.compile(lambda p: kernels.lora_linear(p, save=save), fullgraph=True, backend="aot_eager")
    assert_result(compiled(problem), oracle.lora_linear(problem), save)


@pytest.mark.parametrize(("short", "two_streams", "primal"), [(True, False, True), (False, True, False)])
def test_the_operator_keeps_the_rules_of_custom_operators(device, short, two_streams, primal):
    tensors, numbers = pack(layer(5, 24, 32, 4, FP32, device, short=short, two_streams=two_streams))
    torch.library.opcheck(torch.ops.linlora.lora_linear, (tensors, *numbers, True, primal, "num_stages+1"))


@both_forms
@both_sides
@pytest.mark.parametrize("two_streams", [False, True], ids=["one-stream", "two-streams"])
@pytest.mark.parametrize(("dtype", "rank"), [(FP32, 8), (FP16, 80)], ids=str)
def test_programs_that_share_a_tile(device, dtype, rank, two_streams, adjoint, short):
    problem = layer(5, 40, 72, rank, dtype, device, factor_dtype=FP32, short=short, two_streams=two_streams)
    check(dropped(problem, seed=7, adjoint=adjoint), SHARED)
    if two_streams:
        check(problem._replace(x_tangent=None), SHARED, primal=False)
        check(problem, SHARED, save=False, primal=False)
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
