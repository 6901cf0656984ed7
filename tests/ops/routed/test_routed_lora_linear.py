"""The routed op in every form it runs in, against the float64 reference."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from routed_problems import FORMS, PATHS, cast, check, leaves, make
from torch.nn import functional as F

from linlora import functional, reference
from linlora.ops import composed


@pytest.mark.parametrize("ids", ["batch", "rows", "weights"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PATHS)
def test_output_and_every_gradient_equal_the_reference(path, device, name, form, ids):
    path(name)
    for shape, Q in (((4, 6), 1), ((4, 40), 2), ((7,), 4)):
        check(make(shape, Q=Q, form=form, ids=ids, device=device))
    check(make((3, 2, 3), form=form, ids=ids, bias=False, device=device), torch.float32)


def test_the_reference_is_the_formula_row_by_row(device):
    case = make((5,), Q=2, form="pair", device=device)
    for form in ("plain", "pair"):
        point = {n: case[n] if form == "pair" else None for n in ("A0", "B0")}
        y = reference.routed_lora_linear(**{**case, **point})
        for row, task in enumerate(case["task_ids"].tolist()):
            A_z = torch.cat([sum(case["mixture"][task, q, s] * case["A"][q, s] for s in range(3)) for q in range(2)], 0)
            B_z = torch.cat([sum(case["mixture"][task, q, s] * case["B"][q, s] for s in range(3)) for q in range(2)], 1)
            x = case["x"][row]
            expected = F.linear(x, case["weight"], case["bias"])
            if form == "plain":
                expected = expected + 0.75 * x @ A_z @ B_z
            else:
                update = (x @ case["A0"].t()) @ (case["B0"].t() + B_z) + (x @ A_z) @ case["B0"].t()
                expected = expected + 0.75 * update
            torch.testing.assert_close(y[row], expected)


@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32-factors", "same-dtype-factors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PATHS)
def test_half_precision(path, device, name, form, dtype, factors):
    path(name)
    check(make((4, 32), k=64, n=48, rank=8, form=form, device=device), dtype, factors)
    check(make((40,), k=64, n=48, rank=8, form=form, device=device), dtype, factors)


WRT = [("x",), ("A",), ("B",), ("mixture",), ("A", "B"), ("A0",), ("B0", "x"), ("weight",), ("bias", "mixture")]


@pytest.mark.parametrize("wrt", WRT, ids="+".join)
@pytest.mark.parametrize("name", PATHS)
def test_any_subset_of_the_inputs_can_ask_for_gradients(path, device, name, wrt):
    path(name)
    for ids in ("batch", "rows"):
        check(make((3, 32), form="pair", ids=ids, device=device), wrt=wrt)


@pytest.mark.parametrize("ids", ["batch", "rows"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_by_finite_differences(path, form, ids):
    path("grouped")
    arguments = cast(make((3, 4), form=form, ids=ids, k=4, n=6, S=2, T=3), torch.float64)
    names = list(leaves(arguments))

    def op(*tensors):
        return functional.routed_lora_linear(**{**arguments, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(op, tuple(leaves(arguments).values()))


@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=2).map(tuple), Q=st.integers(1, 4), S=st.integers(1, 5),
    T=st.integers(1, 9), rank=st.integers(1, 9), k=st.integers(1, 5), n=st.integers(1, 5), form=st.sampled_from(FORMS),
    ids=st.sampled_from(["batch", "rows", "weights"]), grouped=st.booleans(),
)  # fmt: skip
@example(shape=(0,), Q=1, S=1, T=1, rank=1, k=1, n=1, form="plain", ids="weights", grouped=False)
@settings(max_examples=80, deadline=None)
def test_shapes_of_every_kind(shape, Q, S, T, rank, k, n, form, ids, grouped):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "SMALL", 0)
        if grouped:
            patch.setattr("linlora.ops.routed_lora_linear.activations_pay", lambda *_, **__: False)
        check(make(shape, Q, S, T, rank, k * Q, n * Q, form, ids=ids), tolerance=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", ["batch", "rows", "weights"])
@pytest.mark.parametrize("name", PATHS)
def test_dropout_of_the_low_rank_branch(path, device, name, ids, form):
    path(name)
    check(make((3, 5), form=form, ids=ids, dropout_p=0.4, device=device))


@pytest.mark.parametrize("form", FORMS)
def test_triton(path, device, form):
    path("grouped")
    check(make((3, 5), form=form, ids="rows", device=device), torch.float32, backend="triton")


def test_every_combination_of_form_path_and_ids_agrees(path):
    """The forms on one problem: what is chosen by cost never changes the result."""
    for form, ids in itertools.product(FORMS, ("batch", "rows", "weights")):
        arguments = make((5, 32), form=form, ids=ids)
        results = []
        for name in PATHS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(composed, "SMALL", 2**62 if name == "activations" else 0)
                patch.setattr("linlora.ops.routed_lora_linear.activations_pay", lambda *_, **__: False)
                results.append(functional.routed_lora_linear(**arguments))
        torch.testing.assert_close(*results)
