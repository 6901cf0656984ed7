"""A layer with factors of its own for every group, on every backend, against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_problems import FORMS, cast, check, grouped, leaves, make_grouped

import linlora
from linlora import functional, reference
from linlora.functional import Groups
from linlora.ops import composed

BACKENDS = ("composed", "torch", "triton")


@pytest.fixture
def on(monkeypatch):
    """on(backend): what `check` calls it; "composed" are calls too small for the Function."""

    def choose(backend):
        monkeypatch.setattr(composed, "SMALL", 2**62 if backend == "composed" else 0)
        return "torch" if backend == "composed" else backend

    return choose


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("ids", ["batch", "rows"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_every_gradient_equal_the_reference(on, device, backend, form, ids, dropout_p):
    check(
        make_grouped((3, 7), form=form, ids=ids, dropout_p=dropout_p, device=device), torch.float32, backend=on(backend)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repeats", [1, 40])
def test_torch_backend_is_exact_in_float64(on, device, repeats, form):
    check(make_grouped((6, repeats), form=form, dropout_p=0.2, device=device), backend=on("torch"))


@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32-factors", "same-dtype-factors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(on, device, backend, dtype, factors):
    case = make_grouped((40,), T=3, n=48, k=64, rank=8, form="pair", ids="rows", device=device)
    check(case, dtype, factors, backend=on(backend))


WRT = [("x",), ("A",), ("B",), ("A", "B"), ("A0",), ("B0", "x"), ("weight",), ("bias", "B")]


@pytest.mark.parametrize("wrt", WRT, ids="+".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_subset_of_the_inputs_can_ask_for_gradients(on, device, backend, wrt):
    check(make_grouped((3, 4), form="pair", device=device), torch.float32, wrt=wrt, backend=on(backend))


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=2).map(tuple), T=st.integers(1, 9), rank=st.integers(1, 9),
    k=st.integers(1, 12), n=st.integers(1, 12), form=st.sampled_from(FORMS), p=st.sampled_from([0.0, 0.4]),
    bias=st.booleans(), backend=st.sampled_from(["composed", "torch"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_shapes_of_every_kind(shape, T, rank, k, n, form, p, bias, backend):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "SMALL", 2**62 if backend == "composed" else 0)
        check(make_grouped(shape, T, rank, k, n, form, bias, "batch", p), tolerance=1e-10, backend="torch")


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_by_finite_differences(on, form):
    on("torch")
    arguments = cast(make_grouped((3, 4), form=form, k=4, n=6, T=3, dropout_p=0.3), torch.float64)
    names = list(leaves(arguments))

    def op(*tensors):
        return grouped({**arguments, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(op, tuple(leaves(arguments).values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_distinct_tasks_and_tasks_without_rows(on, device, backend):
    arguments = make_grouped((20,), T=20, ids="rows", device=device)
    check({**arguments, "task_ids": torch.randperm(20, device=device)}, torch.float32, backend=on(backend))
    check({**arguments, "task_ids": torch.full((20,), 7, device=device)}, torch.float32, backend=on(backend))


@pytest.mark.parametrize("shape", [(0,), (0, 4)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(on, device, backend, form, shape):
    check(make_grouped(shape, form=form, dropout_p=0.5, device=device), torch.float32, backend=on(backend))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_group_is_a_single_adapter(on, device, backend, form):
    arguments = make_grouped((2, 5), T=1, form=form, dropout_p=0.2, device=device)
    check(arguments, torch.float32, backend=on(backend))
    A, B = (None if arguments[n] is None else arguments[n][0].t() for n in "AB")
    point = (
        (arguments["A0"], arguments.get("B0"), A if form == "pair" else None) if form != "plain" else (A, None, None)
    )
    expected = functional.linearized_lora_linear(
        arguments["x"], arguments["weight"], arguments["bias"], *point, B, 0.75, dropout_p=0.2, seed=arguments["seed"]
    )
    assert torch.equal(grouped(arguments), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_cotangents(on, device, backend):
    case = cast(make_grouped((6, 5), form="pair", device=device), torch.float32)
    strided = dict(case)
    strided["x"] = case["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    strided["weight"] = case["weight"].t().contiguous().t()
    strided["A"] = case["A"].detach().mT.contiguous().mT.requires_grad_()
    strided["B"] = case["B"].detach().repeat(1, 1, 2)[..., :8].requires_grad_()
    with linlora.use_backend(on(backend)):
        y = grouped(strided)
    expected = reference.grouped_lora_linear(**case)
    torch.testing.assert_close(y, expected)
    names = ("x", "A", "B")
    for actual, wanted in zip(
        torch.autograd.grad(y.sum(), [strided[n] for n in names]),  # the cotangent is expanded, stride 0
        torch.autograd.grad(expected.sum(), [case[n] for n in names]),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_transforms_of_torch_func(on, device, form):
    on("torch")
    arguments = make_grouped((3, 5), form=form, device=device)
    moving = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    tangents = {n: torch.randn_like(t) for n, t in moving.items()}
    results = [
        torch.func.jvp(lambda tensors, op=op: op({**arguments, **tensors}), (moving,), (tangents,))
        for op in (grouped, lambda a: reference.grouped_lora_linear(**a))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_in_one_graph(device, form):
    arguments = cast(make_grouped((3, 16), form=form, device=device), torch.float64)
    compiled = torch.compile(lambda: grouped(arguments), fullgraph=True, backend="aot_eager")
    tensors = list(leaves(arguments).values())
    results = [
        (y, *torch.autograd.grad(y.sin().sum(), tensors))
        for y in (compiled(), reference.grouped_lora_linear(**arguments))
    ]
    torch.testing.assert_close(*results)


def test_saves_low_rank_products_and_nothing_of_the_size_of_x(on, device):
    on("torch")
    arguments = cast(make_grouped((4, 40), k=40, n=48, device=device), torch.float64, wrt=("x", "B"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        grouped(arguments)
    assert not [t for t in saved if t.dim() == 2 and t.shape[0] >= 160 and t.shape[1] > 2]


def test_triton_repeats_to_the_bit(device):
    arguments = cast(make_grouped((40,), ids="rows", form="pair", device=device), torch.float32)
    runs = []
    for _ in range(2):
        with linlora.use_backend("triton"):
            y = grouped(arguments)
        runs.append((y, *torch.autograd.grad(y.sin().sum(), list(leaves(arguments).values()))))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_groups_on_another_device_are_refused(device):
    arguments = make_grouped(device=device)
    groups = Groups.of(arguments.pop("task_ids").to("meta"), 5, 24)
    with pytest.raises(ValueError, match=r"the groups' ids are on meta, x on .*: move the task ids"):
        functional.grouped_lora_linear(**arguments, groups=groups)


def test_groups_of_another_batch_are_refused(device):
    arguments = make_grouped(device=device)
    groups = Groups.of(arguments.pop("task_ids"), 5, 8)
    with pytest.raises(ValueError, match=r"grouped_lora_linear: the groups are of 8 rows, x has 24"):
        functional.grouped_lora_linear(**arguments, groups=groups)
