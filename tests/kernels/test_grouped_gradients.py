"""The gradients of every group's factors against the formulas in float64."""

import pytest
import torch
from kernel_oracles import assert_close, mask_of
from linlora.kernels.configs import Config
from linlora.kernels.grouped_gradients import grouped_gradients
from linlora.kernels.grouped_problem import GroupedGradients
from linlora.kernels.stacks import group_rows

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CONFIG = Config("gather", 16, 32, 0, 32, 4, 2)


def problem(m, n, k, rank, dtype, device, groups=5):
    shapes = {"p": (m, rank), "g": (m, n), "q": (m, rank), "x": (m, k)}
    tensors = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    return tensors, torch.randint(groups, (m,), device=device)


def check(a, ids, groups=5, out_dtype=FP32, tolerance=None, config=CONFIG, **options):
    layout = group_rows(ids, groups, 1, True)
    problem = GroupedGradients(**a, groups=layout, n_groups=groups, scaling=0.7, dtype=out_dtype, **options)
    d_expand, d_shrink = grouped_gradients(problem, config=config)
    assert d_expand.dtype == d_shrink.dtype == out_dtype
    p, g, q, x = (a[name].double() for name in "pgqx")
    x = x * mask_of(x, options.get("dropout_p", 0.0), options.get("seed"))
    rows = [ids == group for group in range(groups)]
    assert_close("d_expand", d_expand, 0.7 * torch.stack([p[m].t() @ g[m] for m in rows]), tolerance)
    assert_close("d_shrink", d_shrink, 0.7 * torch.stack([x[m].t() @ q[m] for m in rows]), tolerance)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_the_formula(device, dtype):
    check(*problem(75, 40, 72, 16, dtype, device))


@pytest.mark.parametrize("rank", [1, 33, 256])
def test_every_rank(device, rank):
    check(*problem(20, 29, 40, rank, FP16, device, 2), 2)
    check(*problem(20, 29, 40, rank, FP16, device, 2), 2, config=None)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 29, 17), (37, 70, 1), (3, 1, 1)])
def test_odd_sizes(device, m, n, k):
    check(*problem(m, n, k, 4, FP32, device))


def test_all_rows_in_one_group_and_a_group_for_every_row(device):
    tensors, ids = problem(40, 29, 40, 4, FP32, device)
    check(tensors, torch.full_like(ids, 3))
    check(tensors, torch.randperm(40, device=device), 40)


def test_dropout_masks_x_only_at_the_rows_own_places(device):
    check(*problem(75, 29, 40, 4, FP32, device), dropout_p=0.4, seed=torch.tensor(9, device=device))


def test_arbitrary_strides_and_the_dtype_asked_for(device):
    tensors, ids = problem(75, 29, 40, 4, FP16, device)
    tensors = {name: tensor.t().contiguous().t() for name, tensor in tensors.items()}
    check(tensors, ids, out_dtype=FP16)


def test_either_gradient_alone_and_no_rows(device):
    tensors, ids = problem(30, 29, 40, 4, FP32, device)
    layout = group_rows(ids, 5, 1, True)
    whole = GroupedGradients(**tensors, groups=layout, n_groups=5, scaling=1.0, dtype=FP32)
    both = grouped_gradients(whole)
    for left_out in ("pg", "qx"):
        one = grouped_gradients(whole._replace(**dict.fromkeys(left_out)))
        kept = 1 if left_out == "pg" else 0
        assert one[1 - kept] is None
        assert torch.equal(one[kept], both[kept])
    tensors, ids = problem(0, 29, 40, 4, FP32, device)
    nothing = grouped_gradients(whole._replace(**tensors, groups=group_rows(ids, 5, 1, True)))
    assert [tuple(t.shape) for t in nothing] == [(5, 4, 29), (5, 40, 4)]
    assert not any(t.any() for t in nothing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": None}, "p and g come together"),
        (dict.fromkeys("pgqx"), "nothing to do"),
        ({"q": torch.zeros(5, 3)}, "of one rank, got 4 and 3"),
    ],
)
def test_refuses_loudly(device, change, message):
    tensors, ids = problem(5, 29, 40, 4, FP32, device)
    tensors |= {name: value if value is None else value.to(device) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        grouped_gradients(
            GroupedGradients(**tensors, groups=group_rows(ids, 5, 1, True), n_groups=5, scaling=1.0, dtype=FP32)
        )
