"""The routed op: every form it runs in against the float64 reference, and against PEFT's Poly with its parameters."""

import itertools

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from linlora import functional, reference, routing
from linlora.ops import aten, composed
from linlora.ops import mixing as mixing_forms
from linlora.testing import relative_error

PAYS = "linlora.ops.routed_lora_linear.activations_pay"
FORMS = ("plain", "pair", "short")
PATHS = ("grouped", "activations")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
FACTORS = ("A", "B", "A0", "B0", "mixture")


@pytest.fixture
def path(monkeypatch):
    """path("grouped" or "activations") forces that form of the op on a CPU; path("auto") is what users get."""

    def force(name):
        monkeypatch.setattr(composed, "SMALL", 2**62 if name == "activations" else 0)
        if name == "grouped":
            monkeypatch.setattr(PAYS, lambda *_, **__: False)

    return force


def make(shape=(4, 6), Q=2, S=3, T=5, rank=2, k=12, n=8, form="plain", bias=True, ids="batch", device="cpu"):
    """Random float64 arguments; ids for the first dimension ("batch"), for every row ("rows"), or none: per-row w."""

    def normal(*size, scale=1.0):
        return torch.randn(*size, dtype=torch.float64, device=device) * scale

    lead = {"batch": shape[:1], "rows": shape, "weights": None}[ids]
    table = (T,) if lead is not None else shape
    arguments = dict(
        x=normal(*shape, k),
        weight=normal(n, k, scale=k**-0.5),
        bias=normal(n) if bias else None,
        A=normal(Q, S, k // Q, rank, scale=k**-0.5) if form != "short" else None,
        B=normal(Q, S, rank, n // Q, scale=rank**-0.5),
        mixture=torch.softmax(normal(*table, Q, S), -1),
        scaling=0.75,
        task_ids=None if lead is None else torch.randint(T, lead, device=device),
    )
    if form != "plain":
        arguments["A0"] = normal(rank, k, scale=k**-0.5)
    if form == "pair":
        arguments["B0"] = normal(n, rank, scale=rank**-0.5)
    return arguments


def cast(arguments, dtype, factor_dtype=None, wrt=None):
    """The arguments in other dtypes, as leaves: all of them, or those named, ask for a gradient."""
    out = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().to(factor_dtype or dtype if name in FACTORS else dtype)
            value = value.requires_grad_(wrt is None or name in wrt)
        out[name] = value
    return out


def leaves(arguments):
    return {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.requires_grad}


def check(arguments, dtype=torch.float64, factor_dtype=None, wrt=None, tolerance=None):
    """The output and every gradient against the reference, in float64 at the values rounded to `dtype`."""
    tolerance = tolerance or TOLERANCE[dtype]
    rounded = cast(arguments, dtype, factor_dtype, wrt)
    exact = cast(rounded, torch.float64, wrt=wrt)
    y, expected = functional.routed_lora_linear(**rounded), reference.routed_lora_linear(**exact)
    g = torch.randn_like(y)
    assert y.dtype == dtype
    assert relative_error(y, expected) < tolerance
    gradients = torch.autograd.grad(y, list(leaves(rounded).values()), g)
    exact_gradients = torch.autograd.grad(expected, list(leaves(exact).values()), g.double())
    for (name, leaf), actual, wanted in zip(leaves(rounded).items(), gradients, exact_gradients, strict=True):
        assert actual.dtype == leaf.dtype
        assert relative_error(actual, wanted) < tolerance, f"gradient of {name}"


# -- equal to the formula -----------------------------------------------------------------------------------------


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
            patch.setattr(PAYS, lambda *_, **__: False)
        check(make(shape, Q, S, T, rank, k * Q, n * Q, form, ids=ids), tolerance=1e-10)


# -- tasks of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_tasks_without_rows_get_zero_gradients(path, device, name):
    path(name)
    arguments = make((6,), T=4, device=device)
    arguments["task_ids"] = torch.tensor([3, 1, 1, 3, 3, 1], device=device)
    check(arguments)
    arguments = cast(arguments, torch.float64)
    functional.routed_lora_linear(**arguments).sum().backward()
    used = arguments["mixture"].grad.flatten(1).abs().sum(1) > 0
    assert used.tolist() == [False, True, False, True]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("ids", ["batch", "rows"])
def test_one_task_is_one_lora_adapter(path, device, name, ids):
    path(name)
    arguments = make((2, 32), T=1, form="plain", ids=ids, device=device)
    check(arguments)
    A = reference.mix(arguments["A"], arguments["mixture"][0]).flatten(0, 1).t()
    B = reference.mix(arguments["B"], arguments["mixture"][0]).transpose(0, 1).flatten(1).t()
    expected = functional.linearized_lora_linear(
        arguments["x"], arguments["weight"], arguments["bias"], A, None, None, B, 0.75
    )
    torch.testing.assert_close(functional.routed_lora_linear(**arguments), expected)


@pytest.mark.parametrize("name", PATHS)
def test_a_task_id_for_all_rows_and_a_mixture_for_all_rows(path, device, name):
    path(name)
    arguments = make((3, 5), device=device)
    one = {**arguments, "task_ids": torch.tensor(2, device=device)}
    same = {**arguments, "mixture": arguments["mixture"][2], "task_ids": None}
    check(one)
    check(same)
    torch.testing.assert_close(functional.routed_lora_linear(**one), functional.routed_lora_linear(**same))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_task_ids_of_any_integer_type(path, dtype, device):
    path("grouped")
    arguments = make((40,), device=device)
    expected = functional.routed_lora_linear(**arguments)
    arguments["task_ids"] = arguments["task_ids"].to(dtype)
    assert torch.equal(functional.routed_lora_linear(**arguments), expected)


@pytest.mark.parametrize("name", PATHS)
def test_rows_do_not_depend_on_their_neighbours(path, device, name):
    path(name)
    arguments = make((50,), T=7, device=device)
    y = functional.routed_lora_linear(**arguments)
    order = torch.randperm(50, device=device)
    shuffled = {**arguments, "x": arguments["x"][order], "task_ids": arguments["task_ids"][order]}
    torch.testing.assert_close(functional.routed_lora_linear(**shuffled), y[order])
    arguments["x"][arguments["task_ids"] == 0] = torch.inf
    others = arguments["task_ids"] != 0
    torch.testing.assert_close(functional.routed_lora_linear(**arguments)[others], y[others])


@given(ids=st.lists(st.integers(0, 6), max_size=60), repeats=st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_groups_hold_every_row_once_in_a_block_of_its_task(ids, repeats):
    ids = torch.tensor(ids, dtype=torch.int64)
    rows = torch.arange(len(ids) * repeats)
    for static in (False, True):
        layout = aten.group_rows(ids, 7, repeats, static)
        placed = layout.gather(rows.unsqueeze(1))
        assert torch.equal(layout.scatter(placed).squeeze(1), rows)
        real = torch.ones(len(placed), dtype=torch.bool) if layout.real is None else layout.real
        assert real.sum() == len(rows)
        for block, is_real, group in zip(layout.cut(placed), real.view(-1, layout.length), layout.groups, strict=True):
            assert (ids.repeat_interleave(repeats)[block[is_real]] == group).all()


@pytest.mark.parametrize("form", ["plain", "pair"])
def test_uniform_weights_are_the_average_adapter(path, device, form):
    path("grouped")
    arguments = make((4, 32), device=device)
    arguments["mixture"] = torch.full_like(arguments["mixture"], 1 / 3)
    A, B = routing.average(arguments["A"], arguments["B"])
    if form == "pair":
        arguments.update(routing.center(arguments["A"], arguments["B"])._asdict())
    x, weight, bias = (arguments[n] for n in ("x", "weight", "bias"))
    expected = F.linear(x, weight, bias) + 0.75 * x @ A.t() @ B.t()
    torch.testing.assert_close(functional.routed_lora_linear(**arguments), expected)


def test_linearized_routing_is_the_derivative_of_plain_routing_at_its_point(path):
    path("grouped")
    arguments = make((4, 32))
    point = (torch.randn(2, 12, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))
    around = routing.center(arguments["A"], arguments["B"], point)
    at_point = {"A": arguments["A"] - around.A, "B": arguments["B"] - around.B}

    def plain(A, B):
        return reference.routed_lora_linear(**{**arguments, "A": A, "B": B})

    y, y_tangent = torch.func.jvp(plain, tuple(at_point.values()), (around.A, around.B))
    linearized = functional.routed_lora_linear(**{**arguments, **around._asdict()})
    torch.testing.assert_close(linearized, y + y_tangent)
    with pytest.raises(ValueError, match=r"a point A0 \(2, 12\), B0 \(8, 2\) is expected"):
        routing.center(arguments["A"], arguments["B"], point[::-1])


@pytest.mark.parametrize("name", PATHS)
def test_linearized_routing_is_linear_in_the_weights_and_plain_routing_is_not(path, device, name):
    path(name)
    for form, linear in (("pair", True), ("short", True), ("plain", False)):
        arguments = make((30,), form=form, device=device)
        other = torch.rand_like(arguments["mixture"])
        mean = functional.routed_lora_linear(**{**arguments, "mixture": (arguments["mixture"] + other) / 2})
        apart = [functional.routed_lora_linear(**{**arguments, "mixture": w}) for w in (arguments["mixture"], other)]
        assert torch.allclose(mean, sum(apart) / 2) == linear


# -- equal to PEFT ------------------------------------------------------------------------------------------------


def poly_layer(k, n, r, tasks, skills, splits, device):
    """A layer of PEFT's Poly in float64 with random factors and logits."""
    holder = torch.nn.ModuleDict({"layer": torch.nn.Linear(k, n)})
    config = peft.PolyConfig(
        r=r, n_tasks=tasks, n_skills=skills, n_splits=splits, target_modules=["layer"], init_weights=False
    )
    layer = peft.get_peft_model(holder, config).base_model.model["layer"].double().to(device)
    torch.nn.init.normal_(layer.poly_router["default"].module_logits)
    return layer


# (K, N, r, tasks, skills, splits, batch, length): PEFT's own test (flan-t5-small, r = 8, 3 tasks, 2 skills, 4 splits),
# its defaults, a private skill a task, and a shared one.
POLY = {
    "peft-test": (512, 384, 8, 3, 2, 4, 12, 9),
    "defaults": (24, 36, 8, 1, 4, 1, 3, 5),
    "many-heads": (24, 36, 3, 6, 5, 12, 20, 3),
    "rank-one-one-skill": (24, 36, 1, 4, 1, 2, 6, 40),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "sampled"])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("config", POLY.values(), ids=POLY)
def test_equals_the_poly_layer_of_peft(path, device, config, name, training):
    path(name)
    k, n, r, tasks, skills, splits, batch, length = config
    layer = poly_layer(k, n, r, tasks, skills, splits, device).train(training)
    A, B = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    router = layer.poly_router["default"]
    x = torch.randn(batch, length, k, dtype=torch.float64, device=device, requires_grad=True)
    task_ids = torch.arange(batch, device=device) % tasks
    base = layer.base_layer
    torch.manual_seed(1)
    expected = layer(x, task_ids=task_ids)
    torch.manual_seed(1)  # in training PEFT samples the weights of every example
    w = router(task_ids, x) if training else router(torch.arange(tasks, device=device), x)
    y = functional.routed_lora_linear(x, base.weight, base.bias, A, B, w, 1 / r, None if training else task_ids)
    assert relative_error(y, expected) < 1e-12
    g = torch.randn_like(y)
    parameters = [x, A, B, router.module_logits]
    for actual, wanted in zip(
        torch.autograd.grad(y, parameters, g), torch.autograd.grad(expected, parameters, g), strict=True
    ):
        # a single skill's weight is 1 but for PEFT's 1e-12: the gradient of its logit is nothing
        assert relative_error(actual, wanted) < 1e-11 or wanted.norm() < 1e-9


# -- a differentiable op like the others --------------------------------------------------------------------------


def test_forms_are_chosen_by_their_cost(monkeypatch):
    chosen = []
    monkeypatch.setattr(
        "linlora.ops.routed_lora_linear.by_activations",
        lambda *a: chosen.append("activations") or mixing_forms.by_activations(*a),
    )
    cases = {
        "8 tasks, 8 examples": ((8, 128), "batch", 8, []),
        "8 tasks, every row its own": ((2048,), "rows", 8, []),
        "a task every 2 rows": ((1024,), "rows", 512, ["activations"]),
        "weights per token": ((4, 256), "weights", 1, ["activations"]),
        "few rows": ((8,), "rows", 8, ["activations"]),
    }
    for name, (shape, ids, T, expected) in cases.items():
        chosen.clear()
        functional.routed_lora_linear(**make(shape, S=8, T=T, k=128, n=128, rank=4, ids=ids))
        assert chosen == expected, name


@pytest.mark.parametrize("ids", ["batch", "rows"])
def test_saves_low_rank_products_and_nothing_of_the_size_of_x(path, ids):
    path("grouped")
    case = cast(make((4, 32), k=40, n=48, rank=2, ids=ids), torch.float64, wrt=("x", "B"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = functional.routed_lora_linear(**case)
    assert y.requires_grad
    assert not [t for t in saved if t.dim() == 2 and t.shape[0] >= 128 and t.shape[1] > 2]


@pytest.mark.parametrize("name", PATHS)
def test_gradient_checkpointing(path, device, name):
    path(name)
    arguments = cast(make((40,), device=device), torch.float64)
    x = arguments.pop("x")
    tensors = [x, *leaves(arguments).values()]
    run = [
        checkpoint(lambda x: functional.routed_lora_linear(x, **arguments), x, use_reentrant=False),
        functional.routed_lora_linear(x, **arguments),
    ]
    for actual, expected in zip(*(torch.autograd.grad(y.sin().sum(), tensors) for y in run), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_transforms_of_torch_func(path, device, form):
    path("grouped")
    arguments = make((3, 5), form=form, device=device)
    moving = {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    tangents = {n: torch.randn_like(t) for n, t in moving.items()}

    def through(module):
        def op(tensors):
            return module.routed_lora_linear(**{**arguments, **tensors})

        hessian = torch.func.hessian(lambda w: op({"mixture": w}).sin().sum())
        return torch.func.jvp(op, (moving,), (tangents,)), hessian(arguments["mixture"])

    torch.testing.assert_close(through(functional), through(reference))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_in_one_graph(device, form):
    arguments = cast(make((3, 16), form=form, device=device), torch.float64)
    compiled = torch.compile(lambda: functional.routed_lora_linear(**arguments), fullgraph=True, backend="aot_eager")
    tensors = list(leaves(arguments).values())
    results = [(y, *torch.autograd.grad(y.sin().sum(), tensors)) for y in (
        compiled(), reference.routed_lora_linear(**arguments)
    )]  # fmt: skip
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_double_backward_raises_instead_of_dropping_terms(path):
    path("grouped")
    arguments = cast(make((40,)), torch.float64)
    loss = functional.routed_lora_linear(**arguments).sum()
    with pytest.raises(RuntimeError, match=r"grouped_lora_linear.*create_graph"):
        torch.autograd.grad(loss, arguments["x"], create_graph=True)


@pytest.mark.parametrize("name", PATHS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(path, device, name):
    path(name)
    arguments = cast(make((4, 24), k=48, n=32, rank=8, device=device), torch.float32)
    with torch.autocast(device, torch.bfloat16):
        y = functional.routed_lora_linear(**arguments)
    expected = reference.routed_lora_linear(**arguments)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 1.5e-2
    parameters = [arguments[n] for n in ("x", "A", "B", "mixture")]
    for actual, wanted in zip(
        torch.autograd.grad(y.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        assert actual.dtype == torch.float32
        assert relative_error(actual, wanted) < 1.5e-2


# -- what does not fit --------------------------------------------------------------------------------------------

ONES = torch.ones
BAD = {
    "unknown id": (dict(task_ids=torch.tensor([0, 5, 1, 1])), "task id 5 is unknown: the ids of 5 tasks are 0 to 4"),
    "negative id": (dict(task_ids=torch.tensor([0, -1, 1, 1])), "task id -1 is unknown"),
    "wrong length": (dict(task_ids=torch.tensor([0, 1])), r"leading dimensions of x \(4, 6\).*task_ids \(2,\)"),
    "too many dimensions": (dict(task_ids=torch.zeros(4, 6, 12).long()), "task_ids for leading dimensions"),
    "ids of floats": (dict(task_ids=torch.ones(4)), "integers"),
    "missing ids": (dict(task_ids=None), "if it is a table with a row a task, task_ids are missing"),
    "heads that do not divide": (dict(A=ONES(5, 3, 2, 2), B=ONES(5, 3, 2, 1)), "Q = 5 heads do not divide .* 12 .* 8"),
    "ranks that differ": (dict(A=ONES(2, 3, 6, 1)), "differ in heads, skills or rank"),
    "skills that differ": (dict(A=ONES(2, 4, 6, 2)), "differ in heads, skills or rank"),
    "sizes that differ": (dict(A=ONES(2, 3, 12, 2)), r"A \(2, 3, 6, 2\) and B \(2, 3, 2, 4\) are expected"),
    "no skill": (dict(A=ONES(2, 0, 6, 2), B=ONES(2, 0, 2, 4)), "at least one head, one skill"),
    "three dimensions": (dict(A=ONES(3, 6, 2)), r"inventory A \(Q, S, K/Q, r\)"),
    "mixture of other skills": (dict(mixture=ONES(5, 2, 4)), r"mixture \(..., Q = 2, S = 3\)"),
    "mixture of a table of tables": (dict(mixture=ONES(5, 1, 2, 3)), "is a table"),
    "x": (dict(x=ONES(4, 6, 11)), r"x \(4, 6, 11\)"),
    "dtype": (dict(B=ONES(2, 3, 2, 4).half()), "B is torch.float16"),
    "no A": (dict(A=None), "A is missing"),
    "half a point": (dict(B0=ONES(8, 2)), "B0 without A0"),
    "point": (dict(A0=ONES(3, 12), B0=ONES(8, 3)), "A0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    change, message = BAD[name]
    arguments = cast(make(), torch.float32)
    with pytest.raises(ValueError, match=f"routed_lora_linear: .*{message}"):
        functional.routed_lora_linear(**{**arguments, **change})


def test_every_combination_of_form_path_and_ids_agrees(path):
    """The forms on one problem: what is chosen by cost never changes the result."""
    for form, ids in itertools.product(FORMS, ("batch", "rows", "weights")):
        arguments = make((5, 32), form=form, ids=ids)
        results = []
        for name in PATHS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(composed, "SMALL", 2**62 if name == "activations" else 0)
                patch.setattr(PAYS, lambda *_, **__: False)
                results.append(functional.routed_lora_linear(**arguments))
        torch.testing.assert_close(*results)
