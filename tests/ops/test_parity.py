"""Both ops, every backend: outputs and every gradient against the float64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linlora import functional, reference
from linlora.ops import aten
from linlora.testing import relative_error

OPS = ("linearized_lora_linear", "lora_linear")
DTYPE = {"composed": torch.float32, "torch": torch.float32, "triton": torch.float32, "cuda": torch.float16}
BACKENDS = tuple(DTYPE)
WITH_DROPOUT = pytest.mark.parametrize(
    ("backend", "dropout_p"),
    [*((backend, 0.0) for backend in BACKENDS), *((backend, 0.3) for backend in BACKENDS if backend != "cuda")],
)  # the CUDA kernels have no dropout
FACTORS = ("A0", "B0", "dA", "dB")


@pytest.mark.parametrize("form", ["short", "pair"])
@WITH_DROPOUT
def test_layer_scope_equals_the_reference(check, problem, backend, form, dropout_p):
    check("linearized_lora_linear", backend, problem(form=form, dropout_p=dropout_p), DTYPE[backend])


@pytest.mark.parametrize("form", ["short", "pair"])
@pytest.mark.parametrize("tangent", [False, True], ids=["x", "x+x_tangent"])
@WITH_DROPOUT
def test_both_streams_equal_the_reference(check, problem, backend, form, tangent, dropout_p):
    check("lora_linear", backend, problem(form=form, tangent=tangent, dropout_p=dropout_p), DTYPE[backend])


@pytest.mark.parametrize("form", ["short", "pair"])
@pytest.mark.parametrize("tangent", [False, True], ids=["x", "x+x_tangent"])
@pytest.mark.parametrize("used", [(0,), (1,)], ids=["primal-used", "tangent-used"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_either_stream_alone_can_be_differentiated(check, problem, backend, form, tangent, used):
    check("lora_linear", backend, problem(form=form, tangent=tangent), DTYPE[backend], cotangents=used)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["short", "pair"])
def test_torch_backend_is_exact_in_float64(check, problem, op, form):
    check(op, "torch", problem(form=form, tangent=op == "lora_linear", dropout_p=0.2), torch.float64)


@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32-factors", "same-dtype-factors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(check, problem, backend, op, dtype, factors):
    case = problem(shape=(72,), n=48, k=64, rank=8, tangent=op == "lora_linear")  # enough rows for every kernel
    check(op, backend, case, dtype, factors)


@pytest.mark.parametrize(
    "wrt", [("dA", "dB"), ("dB",), ("x",), ("A0", "dB"), ("x", "B0"), ("bias", "dA")], ids="+".join
)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_subset_of_the_inputs_can_ask_for_gradients(check, problem, backend, op, wrt):
    check(op, backend, problem(), DTYPE[backend], wrt=wrt)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wrt", [("x", "dA", "dB"), ("x", "A0", "B0")], ids="+".join)
def test_rows_that_do_not_fold_take_the_pair_form_side_by_side(check, problem, monkeypatch, op, dropout_p, wrt):
    taken, side_by_side = [], aten.lora._side_by_side
    monkeypatch.setattr(aten.lora, "_side_by_side", lambda *arguments: taken.append(1) or side_by_side(*arguments))
    case = problem(shape=(40,), n=48, k=64, rank=2, tangent=op == "lora_linear", dropout_p=dropout_p)
    check(op, "torch", case, torch.float64, wrt=wrt)
    assert taken


@pytest.mark.parametrize("form", ["short", "pair"])
@pytest.mark.parametrize(
    "wrt",
    [("x",), ("x", "dB"), ("dA", "dB"), ("x", "dA", "dB"), ("x", "A0"), ("x", "B0"), ("weight", "A0", "B0", "dB"), ()],
    ids="+".join,
)
def test_many_rows_fold_the_update_into_a_transient_weight(check, problem, form, wrt):
    case = problem(shape=(64,), form=form)
    assert aten.folding_pays(case.x, case.weight)
    assert not aten.folding_pays(case.x[:10], case.weight)
    assert not aten.folding_pays(case.x.bfloat16(), case.weight)
    if wrt:
        check("linearized_lora_linear", "torch", case, torch.float64, wrt=wrt)
    with torch.no_grad():
        (y,), (expected,) = (case.call("linearized_lora_linear", module) for module in (functional, reference))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("rank", [1, 5, 16, 33, 256])
@pytest.mark.parametrize("form", ["short", "pair"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_rank(check, problem, backend, form, rank):
    check("linearized_lora_linear", backend, problem(form=form, rank=rank, n=19, k=35), DTYPE[backend])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_leading_dimensions(check, problem, backend, op, shape):
    check(op, backend, problem(shape=shape, bias=False, tangent=op == "lora_linear"), DTYPE[backend])


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("form", ["short", "pair"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(check, problem, backend, op, form, shape):
    dropout_p = 0.0 if backend == "cuda" else 0.5
    check(op, backend, problem(shape=shape, form=form, dropout_p=dropout_p), DTYPE[backend])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_cotangents(problem, running, tolerance, backend, op):
    case = problem(shape=(6, 5), tangent=True).cast(DTYPE[backend])
    strided = case._replace(
        x=case.x.transpose(0, 1).contiguous().transpose(0, 1),
        x_tangent=case.x_tangent.transpose(0, 1).contiguous().transpose(0, 1),
        weight=case.weight.t().contiguous().t(),  # the layout of transformers' Conv1D
        shrink=case.A0.t().contiguous().t(),
        expand=case.B0.t().contiguous().t(),
        d_shrink=case.dA.repeat(1, 2)[:, : case.dA.shape[1]],
    )
    results = []
    for arguments, module in ((strided, functional), (case.cast(torch.float64), reference)):
        arguments.require_grad(("dB",))
        arguments = arguments._replace(x=arguments.x.detach().requires_grad_())
        with running(backend):
            y = arguments.call(op, module)[-1]
        gradients = torch.autograd.grad(y.sum(), [arguments.x, arguments.dB])  # the cotangent is expanded, stride 0
        results.append((y, *gradients))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < tolerance[DTYPE[backend]]


@given(
    m=st.integers(0, 9), n=st.integers(1, 40), k=st.integers(1, 40), rank=st.integers(1, 9),
    form=st.sampled_from(["short", "pair"]), tangent=st.booleans(), bias=st.booleans(), p=st.sampled_from([0.0, 0.4]),
)  # fmt: skip
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
def test_shapes_of_every_kind(check, problem, m, n, k, rank, form, tangent, bias, p):
    case = problem(shape=(m,), n=n, k=k, rank=rank, form=form, tangent=tangent, bias=bias, dropout_p=p)
    for backend in ("composed", "torch"):
        check("lora_linear", backend, case, torch.float64, tolerance=1e-10)
        check("linearized_lora_linear", backend, case, torch.float64, wrt=("x", *FACTORS), tolerance=1e-10)


def test_gradcheck_by_finite_differences(problem):
    case = problem(tangent=True, dropout_p=0.3).require_grad(("x", "x_tangent", *FACTORS, "bias", "weight"))
    leaves = tuple(case.leaves().values())

    def dual(x, weight, bias, A0, B0, dA, dB, x_tangent):
        return functional.lora_linear(
            x, weight, bias, A0, B0, dA, dB, 0.75, x_tangent, dropout_p=0.3, seed=case.seed
        )  # fmt: skip

    assert torch.autograd.gradcheck(dual, leaves)


def test_tangent_equals_forward_mode_ad_of_plain_lora(problem):
    """The independent oracle: torch.func.jvp of the textbook LoRA layer, all of its parameters as primals."""
    case = problem(tangent=True)

    def plain_lora(x, weight, bias, A, B):
        return x @ weight.t() + bias + 0.75 * (x @ A.t()) @ B.t()

    zeros = (torch.zeros_like(case.weight), torch.zeros_like(case.bias))
    y, y_tangent = torch.func.jvp(
        plain_lora, (case.x, case.weight, case.bias, case.A0, case.B0), (case.x_tangent, *zeros, case.dA, case.dB)
    )
    actual, actual_tangent = case.call("lora_linear", functional)
    torch.testing.assert_close(actual, y)
    torch.testing.assert_close(actual_tangent, y_tangent)
