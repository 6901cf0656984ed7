"""The routed layer's two kernels, shrink and update, against the formulas in float64."""

import pytest
import torch
from kernel_oracles import assert_close, mask_of, wide
from linlora.kernels.configs import Config
from linlora.kernels.grouped_problem import GroupedLoraLinear
from linlora.kernels.grouped_shrink import grouped_shrink, partial_products
from linlora.kernels.stacks import group_rows

from linlora import kernels, reference

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Tiles so small that groups meet in them, and odd little matrices have several in every direction.
CONFIG = Config("gather", 16, 32, 32, 32, 4, 2, group_m=2)
FORWARD = {
    "plain": ("d_shrink", "d_expand"),
    "pair": ("shrink", "d_shrink", "expand", "d_expand"),
    "short": ("shrink", "d_expand"),
    "short-adjoint": ("d_shrink", "expand"),
}


def problem(m, n, k, rank, dtype, device, groups=5, roles=FORWARD["pair"], factor_dtype=None, **_):
    """Arguments of the layer, and the group of every row."""

    def random(*shape, of=None):
        return (torch.randn(shape) / max(1, shape[-2]) ** 0.5).to(device, of or dtype)

    factor_dtype = factor_dtype or dtype
    shapes = {
        "shrink": (rank, k), "expand": (n, rank), "d_shrink": (groups, k, rank), "d_expand": (groups, rank, n)
    }  # fmt: skip
    factors = {name: random(*shape, of=factor_dtype) if name in roles else None for name, shape in shapes.items()}
    ids = torch.randint(groups, (m,), device=device)
    x, weight = torch.randn(m, k).to(device, dtype), random(k, n).t()
    return {"x": x, "weight": weight, "bias": torch.randn(n).to(device, dtype), **factors}, ids


def layer(arguments, layout, scaling=1.0, **options):
    """The problem that the kernels take."""
    return GroupedLoraLinear(**arguments, groups=layout, scaling=scaling, **options)


def formula(a, ids, scaling, dropout_p=0.0, seed=None, adjoint=False, x_tangent=None):
    """(y, u, c), or with a tangent (y, y_tangent, u), in float64."""
    x, W, b, S0, E0, dS, dE, x_t = wide(*a.values(), x_tangent)
    S0, E0 = (None if factor is None else factor.t() for factor in (S0, E0))

    def rows(low, factor):
        return (low.unsqueeze(1) @ factor[ids]).squeeze(1)

    mask_in = 1.0 if adjoint else mask_of(x, dropout_p, seed)
    low, y = x * mask_in, x @ W.t() + b
    u = None if S0 is None else low @ S0
    v = None if dS is None else rows(low, dS)
    if x_t is not None:
        v = torch.zeros_like(u) if v is None else v
        v = v + (x_t * mask_in) @ S0
        y_t = x_t @ W.t() + scaling * rows(u, dE)
        return (y if E0 is None else y + scaling * u @ E0), (y_t if E0 is None else y_t + scaling * v @ E0), u
    c = v if u is None or v is None else u + v
    update = torch.zeros_like(y)
    if dE is not None:
        update = update + rows(c if u is None else u, dE)
    if E0 is not None:
        update = update + c @ E0
    mask_out = mask_of(update, dropout_p, seed) if adjoint else 1.0
    return y + scaling * mask_out * update, u, c


def check(a, ids, groups=5, scaling=0.7, tolerance=None, config=CONFIG, **options):
    layout = group_rows(ids, groups, 1, True)
    adjoint, named = options.pop("adjoint", False), ("y", "u", "c")
    made = kernels.grouped_lora_linear(layer(a, layout, scaling, masks_update=adjoint, **options), config=config)
    expected = dict(zip(named, formula(a, ids, scaling, adjoint=adjoint, **options), strict=True))
    if a["d_shrink"] is None:
        expected["c"] = None  # it is u
    for name, actual in ((name, getattr(made, name)) for name in named):
        assert (actual is None) == (expected[name] is None), name
        if actual is not None:
            assert actual.dtype == a["x"].dtype
            assert_close(name, actual, expected[name], tolerance)


@pytest.mark.parametrize("roles", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_the_formula(device, dtype, roles):
    check(*problem(37, 40, 72, 16, dtype, device, roles=roles))


@pytest.mark.parametrize("rank", [1, 33, 64, 256])
def test_every_rank(device, rank):
    check(*problem(7, 40, 64, rank, FP16, device))


@pytest.mark.parametrize(("m", "n", "k"), [(1, 29, 17), (5, 130, 96), (37, 29, 17), (37, 33, 1), (20, 7, 0)])
def test_odd_sizes(device, m, n, k):
    check(*problem(m, n, k, 4, FP32, device))


@pytest.mark.parametrize("config", [CONFIG, None], ids=["small-tiles", "table"])
def test_groups_that_meet_in_a_tile(device, config):
    for m, groups in ((20, 20), (20, 1), (20, 300)):
        arguments, _ = problem(m, 24, 40, 8, FP32, device, groups=groups)
        check(arguments, torch.arange(m, device=device) * groups // m, groups, config=config)


@pytest.mark.parametrize("roles", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
def test_dropout_masks_the_input_of_the_shrink_or_the_update(device, adjoint, roles):
    seed = torch.tensor(2**31 - 5, device=device)
    check(*problem(20, 40, 64, 8, FP32, device, roles=roles), dropout_p=0.4, seed=seed, adjoint=adjoint)


def test_the_mask_is_the_references_bit_for_bit_at_the_rows_own_places(device):
    m, k = 37, 64
    seed, layout = torch.tensor(5, device=device), group_rows(torch.arange(m, device=device).flip(0), m, 1, True)
    eye, ones = torch.eye(k, device=device), torch.ones(m, k, device=device)
    of_one = {"x": ones, "weight": eye, "bias": None, "shrink": eye, "expand": None, "d_shrink": None, "d_expand": None}
    u, _ = grouped_shrink(layer(of_one, layout, dropout_p=0.3, seed=seed))
    assert torch.equal(u != 0, reference.keep_mask(m, k, 0.3, seed))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_fp32_factors_beside_16_bit_activations(device, dtype):
    check(*problem(20, 40, 64, 8, dtype, device, factor_dtype=FP32))


def test_arbitrary_strides(device):
    arguments, ids = problem(20, 40, 64, 8, FP32, device)
    for name, tensor in arguments.items():
        arguments[name] = torch.stack([tensor.mT, tensor.mT], -1)[..., 0].mT if tensor.ndim > 1 else tensor
    check(arguments, ids)


def test_few_rows_split_the_columns_and_many_do_not(device):
    config = Config("gather", 16, 32, 32, 32, 4, 2, programs=2)
    for m, splits in ((5, 2), (32, 1)):
        x = torch.randn(m, 256, device=device)
        d_shrink = torch.randn(3, 256, 8, device=device)
        ids = torch.randint(3, (m,), device=device)
        factors = {"shrink": None, "expand": None, "d_shrink": d_shrink, "d_expand": None}
        of_groups = {"x": x, "weight": x, "bias": None, **factors}
        u, v = partial_products(layer(of_groups, group_rows(ids, 3, 1, True)), config)
        assert u is None
        assert v.shape == (splits, m, 8)
        assert_close("v", v.sum(0), (x.double().unsqueeze(1) @ d_shrink.double()[ids]).squeeze(1))


@pytest.mark.parametrize("tangent", [True, False], ids=["x_t", "no-x_t"])
@pytest.mark.parametrize("form", ["pair", "short"])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_both_streams(device, dtype, form, tangent):
    arguments, ids = problem(37, 40, 72, 40, dtype, device, roles=FORWARD[form])
    x_tangent = torch.randn_like(arguments["x"]) if tangent else None
    seed = torch.tensor(77, device=device)
    options = dict(x_tangent=x_tangent, dropout_p=0.3, seed=seed, two_streams=True)
    outputs = kernels.grouped_lora_linear(layer(arguments, group_rows(ids, 5, 1, True), 0.7, **options), config=CONFIG)
    zero = torch.zeros_like(arguments["x"])
    expected = formula(arguments, ids, 0.7, 0.3, seed, x_tangent=x_tangent if tangent else zero)
    for name, actual, wanted in zip(("y", "y_tangent", "u"), outputs[:3], expected, strict=True):
        assert_close(name, actual, wanted)
    assert outputs.c is None


def test_empty_sides(device):
    arguments, ids = problem(0, 40, 64, 8, FP32, device)
    y, _, u, c = kernels.grouped_lora_linear(layer(arguments, group_rows(ids, 5, 1, True)))
    assert (y.shape, u.shape, c.shape) == ((0, 40), (0, 8), (0, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(d_shrink=torch.zeros(4, 64, 8)), r"d_shrink is \(5, 64, 8\)"),
        (dict(expand=torch.zeros(41, 8)), r"expand is \(40, 8\)"),
        (dict(shrink=None, d_shrink=None), "a shrink, a d_shrink, or both"),
        (dict(x=torch.zeros(19, 64)), "the groups are of 20 rows, x has 19"),
        (dict(shrink=torch.zeros(257, 64)), "rank 257 is outside 1..256"),
        (dict(weight=torch.zeros(40, 63)), r"weight is \(40, 64\)"),
    ],
)
def test_refuses_loudly(device, change, message):
    arguments, ids = problem(20, 40, 64, 8, FP32, device)
    arguments |= {name: value if value is None else value.to(device) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        kernels.grouped_lora_linear(layer(arguments, group_rows(ids, 5, 1, True)))
