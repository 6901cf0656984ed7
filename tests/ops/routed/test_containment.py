"""What is not finite in one task's rows, factors or cotangent stays in that task, forward and backward."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linlora.kernels.grouped_problem import GroupedLoraLinear

import linlora
from linlora import functional, reference
from linlora.ops import composed, dual

TASKS, K, N, RANK = 3, 9, 7, 2
POISONS = ("x", "A", "B", "g")


def problem(form, ids, repeats, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "x": normal(len(ids), repeats, K), "weight": normal(N, K), "bias": normal(N),
        "A": normal(TASKS, K, RANK), "B": normal(TASKS, RANK, N),
        "A0": None if form == "plain" else normal(RANK, K), "B0": normal(N, RANK) if form == "pair" else None,
        "g": normal(len(ids), repeats, N),
    }  # fmt: skip


def poisoned(arguments, position, value, ids):
    """The arguments with a value in a row of task 1, or in one factor of it; None if the task has no rows."""
    rows = (torch.tensor(ids) == 1).nonzero()
    if position in ("x", "g"):
        if len(rows) == 0:
            return None
        where = (int(rows[-1]), 0, 1)
    else:
        where = (1, 0, 1)
    changed = arguments[position].clone()
    changed[where] = value
    return {**arguments, position: changed}


def own(tensors, ids):
    """What belongs to the other tasks: their rows of y and dx, their factors' gradients."""
    rows = torch.tensor(ids) != 1
    others = torch.tensor([0, 2])
    y, dx, dA, dB = tensors
    return [y[rows], dx[rows], *(None if d is None else d[others] for d in (dA, dB))]


@given(
    backend=st.sampled_from(["torch", "composed", "triton"]),
    form=st.sampled_from(["plain", "short", "pair", "two streams"]),
    position=st.sampled_from(POISONS),
    value=st.sampled_from([float("nan"), float("inf")]),
    ids=st.lists(st.integers(0, TASKS - 1), min_size=2, max_size=9),
    repeats=st.sampled_from([1, 3, 33]),
    p=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_grouped_rows(backend, form, position, value, ids, repeats, p):
    clean = problem("pair" if form == "two streams" else form, ids, repeats)
    dirty = poisoned(clean, position, value, ids)
    if dirty is None:
        return
    seed = torch.tensor(11) if p else None
    results = []
    for arguments in (clean, dirty):
        groups = functional.Groups.of(torch.tensor(ids), TASKS, len(ids) * repeats)
        tensors = {name: t if t is None else t.clone() for name, t in arguments.items()}
        leaves = [tensors[name].requires_grad_() for name in ("x", "A", "B")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(composed, "SMALL", 2**62 if backend == "composed" else 0)
            layer = [tensors[name] for name in ("x", "weight", "bias")]
            with linlora.use_backend("triton" if backend == "triton" else "torch"):
                if form == "two streams":
                    factors = (tensors[name] for name in ("A0", "B0", "A", "B"))
                    options = dict(x_tangent=layer[0].detach(), dropout_p=p, seed=seed)
                    y, y_tangent = dual.grouped_lora_linear(GroupedLoraLinear(*layer, *factors, groups, 0.5, **options))
                else:
                    y = y_tangent = functional.grouped_lora_linear(
                        *layer, tensors["A"], tensors["B"], groups, 0.5, A0=tensors["A0"], B0=tensors["B0"],
                        dropout_p=p, seed=seed,
                    )  # fmt: skip
        gradients = torch.autograd.grad(y, leaves, tensors["g"], allow_unused=True)
        rows = torch.cat([y, y_tangent], -1).detach()
        results.append((own((rows, *gradients), ids), rows, gradients))
    (wanted, *_), (found, rows, gradients) = results
    for actual, expected in zip(found, wanted, strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    told = [t for t in (rows, *gradients) if t is not None]  # and it is not lost either, where it has an effect
    if not (form == "short" and position == "A"):
        assert not all(t.isfinite().all() for t in told) or (position in "AB" and 1 not in ids)


@given(
    backend=st.sampled_from(["torch", "triton"]),
    position=st.sampled_from(["A", "B", "g"]),
    value=st.sampled_from([float("nan"), float("inf")]),
    repeats=st.sampled_from([1, 3]),
    heads=st.sampled_from([1, 2]),
    by=st.sampled_from(["tasks", "weights"]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_skill_of_weight_zero_has_no_part(backend, position, value, repeats, heads, by):
    """Rows of three tasks; weights of task 0 and 2 leave skill 1 out, those of task 1 have it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, 1, 2, 1, 0])
    table = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).unsqueeze(1).repeat(1, heads, 1)
    clean = {
        "x": torch.randn(5, repeats, 8, generator=generator), "A": torch.randn(heads, 3, 8 // heads, 2),
        "B": torch.randn(heads, 3, 2, 6 // heads), "g": torch.randn(5, repeats, 6),
    }  # fmt: skip
    dirty = {name: t.clone() for name, t in clean.items()}
    if position == "g":
        dirty["g"][1, 0, 0] = value  # a row of task 1
    else:
        dirty[position][0, 1, 0, 0] = value  # skill 1
    results = []
    for arguments in (clean, dirty):
        x, A, B = (arguments[name].clone().requires_grad_() for name in ("x", "A", "B"))
        mixture = (table,) if by == "tasks" else (table[ids],)
        with linlora.use_backend(backend):
            y = functional.routed_lora_linear(
                x, torch.ones(6, 8), None, A, B, *mixture, 0.5, ids if by == "tasks" else None
            )
        dx, dA, dB = torch.autograd.grad(y, (x, A, B), arguments["g"])
        rows = ids != 1
        results.append([y[rows], dx[rows], dA[:, [0, 2]], dB[:, [0, 2]]])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("unseen", "position"),
    [*itertools.product(["compiled", "as on a GPU"], POISONS), ("torch.func", "A"), ("torch.func", "B")],
)
@pytest.mark.parametrize("form", ["plain", "short", "pair"])
def test_a_skill_of_weight_zero_has_no_part_where_nobody_looks_at_the_weights(unseen, form, position, monkeypatch):
    """Activations are mixed; rows of three tasks, as above."""
    if unseen == "as on a GPU":
        for module in ("routed_lora_linear", "mixing", "aten.mixing"):
            monkeypatch.setattr(f"linlora.ops.{module}.readable", lambda _: False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0, 1, 2, 1, 0])
    table = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).unsqueeze(1).repeat(1, 2, 1)
    shapes = {"x": (5, 3, 8), "A": (2, 3, 4, 2), "B": (2, 3, 2, 3), "g": (5, 3, 6), "A0": (2, 8), "B0": (6, 2)}
    clean = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    dirty = {name: t.clone() for name, t in clean.items()}
    dirty[position][(0, 1, 0, 0) if position in "AB" else (1, 0, 0)] = float("nan")
    point = {"plain": {}, "short": {"A0": clean["A0"]}, "pair": {"A0": clean["A0"], "B0": clean["B0"]}}[form]

    def layer(x, A, B):
        return functional.routed_lora_linear(x, torch.ones(6, 8), None, A, B, table, 0.5, ids, **point)

    function = torch.compile(layer, backend="aot_eager", fullgraph=True) if unseen == "compiled" else layer
    results = []
    for arguments in (clean, dirty):
        x, A, B = (arguments[name].clone().requires_grad_() for name in ("x", "A", "B"))
        if unseen == "torch.func":
            y, pull = torch.func.vjp(function, x, A, B)
            dx, dA, dB = pull(arguments["g"])
        else:
            y = function(x, A, B)
            gradients = torch.autograd.grad(y, (x, A, B), arguments["g"], allow_unused=form == "short")
            dx, dA, dB = (torch.zeros(()) if t is None else t for t in gradients)
        rows = ids != 1
        told = y.isfinite().all() and all(t.isfinite().all() for t in (dx, dA, dB))
        results.append([y[rows], dx[rows], dA[:, [0, 2]] if dA.dim() else dA, dB[:, [0, 2]], told])
    *wanted, all_finite = results[0]
    *found, told = results[1]
    torch.testing.assert_close(found, wanted)
    assert all_finite
    assert not told or (form == "short" and position == "A")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_mixing_tells_what_is_not_finite_where_it_is_selected(backend, value):
    A, B = torch.randn(1, 3, 4, 2), torch.randn(1, 3, 2, 5)
    A[0, 1, 0, 0] = B[0, 1, 0, 0] = value
    weights = torch.tensor([[[0.5, 0.0, 0.5]], [[0.1, 0.1, 0.8]]])
    with linlora.use_backend(backend):
        (mixed_A,), (mixed_B,) = functional.mix_inventories([A], [B], [weights])
    expected_A, expected_B = reference.mix_inventories([A[:, ::2]], [B[:, ::2]], [weights[..., ::2]])
    torch.testing.assert_close(mixed_A[0], expected_A[0][0])
    torch.testing.assert_close(mixed_B[0], expected_B[0][0])
    assert not mixed_A[1, 0, 0].isfinite()
    assert not mixed_B[1, 0, 0].isfinite()
    assert int(mixed_A[1].isfinite().sum()) == 7
