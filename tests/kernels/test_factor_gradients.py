"""Both skinny gradients against the formulas in float64."""

import sys

import pytest
import torch
from kernel_oracles import SPLIT, SPLIT_MANY, assert_close, mask_of
from linlora.kernels import counters
from linlora.kernels.factor_gradients import host
from linlora.kernels.packing import pack
from linlora.kernels.problem import FactorGradients

from linlora import kernels, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SPLITS = [pytest.param(SPLIT, id="one-split"), pytest.param(SPLIT_MANY, id="many-splits")]


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    """Splits as short as a tile, so that small matrices have several."""

    monkeypatch.setattr(sys.modules["linlora.kernels.factor_gradients"], "MIN_ROWS_PER_SPLIT", 16)


def arguments_of(m, n, k, rank_p, rank_q, dtype, device) -> dict:
    shapes = {"p": (m, rank_p), "g": (m, n), "q": (m, rank_q), "x": (m, k)}
    return {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}


def check(arguments: dict, config, scaling=0.7, out_dtype=FP32, tolerance=None, **options) -> None:
    d_expand, d_shrink = host(FactorGradients(**arguments, scaling=scaling, dtype=out_dtype, **options), config)
    assert d_expand.dtype == d_shrink.dtype == out_dtype
    p, g, q, x = (arguments[name].double() for name in "pgqx")
    dropped = x * mask_of(x, options.get("dropout_p", 0.0), options.get("seed"))
    assert_close("d_expand", d_expand, scaling * g.t() @ p, tolerance)
    assert_close("d_shrink", d_shrink, scaling * q.t() @ dropped, tolerance)


@pytest.mark.parametrize("config", SPLITS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_the_formula(device, dtype, config):
    check(arguments_of(75, 72, 40, 16, 8, dtype, device), config)


@pytest.mark.parametrize("config", SPLITS)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_rounds_to_the_dtype_asked_for(device, dtype, config):
    check(arguments_of(75, 40, 40, 4, 4, dtype, device), config, out_dtype=dtype)


@pytest.mark.parametrize("config", SPLITS)
@pytest.mark.parametrize(("rank_p", "rank_q"), [(1, 1), (4, 33), (64, 1), (33, 80)])
def test_ranks_may_differ_and_exceed_a_block(device, rank_p, rank_q, config):
    check(arguments_of(37, 29, 40, rank_p, rank_q, FP32, device), config)


def test_rank_512_with_the_tables_own_configuration(device):
    check(arguments_of(20, 29, 40, 512, 300, FP16, device), None)


@pytest.mark.parametrize("config", SPLITS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 29, 17), (5, 130, 96), (37, 29, 17), (100, 1, 1)])
def test_odd_sizes(device, m, n, k, config):
    check(arguments_of(m, n, k, 4, 4, FP32, device), config)


@pytest.mark.parametrize("config", SPLITS)
def test_dropout_masks_x_only(device, config):
    check(arguments_of(75, 29, 40, 4, 4, FP32, device), config, dropout_p=0.4, seed=torch.tensor(9, device=device))


def test_the_mask_is_the_references_bit_for_bit(device):
    m, k = 32, 40
    seed = torch.tensor(31337, device=device)
    eye, ones = torch.eye(m, device=device), torch.ones(m, k, device=device)
    _, d_shrink = host(FactorGradients(None, None, eye, ones, 1.0, FP32, 0.3, seed), config=SPLIT)
    assert torch.equal(d_shrink != 0, reference.keep_mask(m, k, 0.3, seed))


@pytest.mark.parametrize("config", SPLITS)
def test_arbitrary_strides(device, config):
    arguments = arguments_of(75, 29, 40, 4, 4, FP32, device)
    check({name: tensor.t().contiguous().t() for name, tensor in arguments.items()}, config)


@pytest.mark.parametrize("config", SPLITS)
def test_either_gradient_alone(device, config):
    a = arguments_of(75, 29, 40, 4, 8, FP32, device)
    both = host(FactorGradients(**a, scaling=0.7, dtype=FP32), config)
    d_expand, absent = host(FactorGradients(a["p"], a["g"], None, None, 0.7, FP32), config)
    assert absent is None
    assert_close("d_expand", d_expand, both[0].double(), 1e-6)
    absent, d_shrink = host(FactorGradients(None, None, a["q"], a["x"], 0.7, FP32), config)
    assert absent is None
    assert_close("d_shrink", d_shrink, both[1].double(), 1e-6)


def test_no_rows_give_zero_gradients(device):
    d_expand, d_shrink = host(FactorGradients(**arguments_of(0, 29, 40, 4, 8, FP32, device), scaling=1.0, dtype=FP32))
    assert d_expand.shape == (29, 4)
    assert d_shrink.shape == (8, 40)
    assert not d_expand.any()
    assert not d_shrink.any()


def test_counters_return_to_zero_and_launches_repeat(device):
    arguments = arguments_of(100, 72, 40, 40, 8, FP16, device)
    problem = FactorGradients(**arguments, scaling=0.7, dtype=FP32)
    launches = [host(problem, SPLIT_MANY) for _ in range(2)]
    for one, other in zip(*launches, strict=True):
        assert torch.equal(one, other)
    assert not any(buffer.any() for buffer in counters._buffers.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": None}, "p and g come together"),
        ({"p": None, "g": None, "q": None, "x": None}, "nothing to do"),
        ({"q": torch.zeros(5, 513)}, "R in 1..512"),
        ({"q": torch.zeros(4, 8), "x": torch.zeros(4, 40)}, "share rows"),
        ({"p": torch.zeros(4, 8)}, r"share their rows, got p \(4, 8\), g \(5, 29\)"),
    ],
)
def test_refuses_loudly(device, change, message):
    change = {key: value if value is None else value.to(device) for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        host(FactorGradients(**{**arguments_of(5, 29, 40, 4, 4, FP32, device), **change}, scaling=1.0, dtype=FP32))


def test_compiles_without_a_graph_break(device, monkeypatch):
    """And keeps no counters: under mode="reduce-overhead" they would lie in the memory of a CUDA graph."""
    monkeypatch.setattr(counters, "_buffers", {})
    a = arguments_of(20, 29, 40, 4, 8, FP32, device)
    compiled = torch.compile(
        lambda p, g, q, x: kernels.factor_gradients(FactorGradients(p, g, q, x, 0.5, FP32)),
        fullgraph=True,
        backend="aot_eager",
    )
    d_expand, d_shrink = compiled(**a)
    assert_close("d_expand", d_expand, 0.5 * a["g"].double().t() @ a["p"].double())
    assert_close("d_shrink", d_shrink, 0.5 * a["q"].double().t() @ a["x"].double())
    assert not counters._buffers


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_the_operator_keeps_the_rules_of_custom_operators(device, dtype):
    a = arguments_of(20, 29, 40, 4, 8, dtype, device)
    for problem in (
        FactorGradients(**a, scaling=0.5, dtype=FP32),
        FactorGradients(None, None, a["q"], a["x"], 1.0, dtype),
    ):
        tensors, numbers = pack(problem)
        torch.library.opcheck(torch.ops.linlora.factor_gradients, (tensors, *numbers))
