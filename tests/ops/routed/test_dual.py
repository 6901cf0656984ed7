"""Both streams of a routed layer, and the gradient of its primal alone."""

import pytest
import torch
from linlora.kernels.grouped_problem import GroupedLoraLinear
from routed_problems import cast, make_grouped

import linlora
from linlora import reference
from linlora.functional import Groups
from linlora.ops import dual
from linlora.testing import relative_error

CASES = [("torch", torch.float64, 1e-12), ("torch", torch.float32, 1e-5), ("triton", torch.float32, 1e-5)]


def run(arguments, x_tangent):
    arguments = dict(arguments)
    task_ids, rows = arguments.pop("task_ids"), arguments["x"].numel() // arguments["x"].shape[-1]
    groups = Groups.of(task_ids, arguments["B"].shape[0], rows)
    names = {"A0": "shrink", "B0": "expand", "A": "d_shrink", "B": "d_expand"}
    named = {names.get(name, name): value for name, value in {"B0": None, **arguments}.items()}
    return dual.grouped_lora_linear(GroupedLoraLinear(**named, groups=groups, x_tangent=x_tangent))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("tangent", [True, False], ids=["x_t", "no-x_t"])
@pytest.mark.parametrize("form", ["pair", "short"])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), CASES, ids=["float64", "torch", "triton"])
def test_streams_equal_the_reference_and_gradients_are_those_of_the_primal(
    device, backend, dtype, tolerance, form, tangent, dropout_p
):
    arguments = cast(make_grouped((3, 7), form=form, dropout_p=dropout_p, device=device), dtype, wrt=("x", "A", "B"))
    x_tangent = torch.randn_like(arguments["x"]) if tangent else None
    with linlora.use_backend(backend):
        y, y_tangent = run(arguments, x_tangent)
    exact = {"B0": None, **cast(arguments, torch.float64)}
    wide = None if x_tangent is None else x_tangent.double()
    expected, expected_tangent = reference.dual_grouped_lora_linear(**exact, x_tangent=wide)
    assert relative_error(y, expected) < tolerance
    assert relative_error(y_tangent, expected_tangent) < tolerance
    assert not y_tangent.requires_grad

    # the primal is a function of (A0 + A_t, B0 + B_t), differentiated where the offsets are zero
    names = [name for name in ("x", "A", "B") if arguments[name] is not None]
    at_point = exact | {n: torch.zeros_like(exact[n]).requires_grad_() for n in names if n != "x"}
    g = torch.randn_like(y)
    wanted = torch.autograd.grad(reference.grouped_lora_linear(**at_point), [at_point[n] for n in names], g.double())
    actual = torch.autograd.grad(y, [arguments[n] for n in names], g)
    for name, gradient, exact_gradient in zip(names, actual, wanted, strict=True):
        assert relative_error(gradient, exact_gradient) < tolerance, f"gradient of {name}"


def test_the_tangent_is_forward_mode_ad_of_plain_routing(device):
    """The independent oracle: torch.func.jvp of plain routing at the point, over x and the factors of every group."""
    arguments = make_grouped((3, 7), form="pair", device=device)
    x_tangent = torch.randn_like(arguments["x"])
    A0, B0, tasks = arguments["A0"], arguments["B0"], arguments["B"].shape[0]

    def plain(x, A, B):
        update = torch.stack([
            row @ A[task] @ B[task]
            for example, task in zip(x, arguments["task_ids"].tolist(), strict=True)
            for row in example
        ]).view(*x.shape[:-1], -1)  # fmt: skip
        return torch.nn.functional.linear(x, arguments["weight"], arguments["bias"]) + 0.75 * update

    point = (arguments["x"], A0.t().repeat(tasks, 1, 1), B0.t().repeat(tasks, 1, 1))
    expected = torch.func.jvp(plain, point, (x_tangent, arguments["A"], arguments["B"]))
    torch.testing.assert_close(run(arguments, x_tangent), expected)


@pytest.mark.parametrize("wrt", [("x",), ("A",), ("B",), ()], ids=["x", "A", "B", "nothing"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_subset_of_the_inputs_can_ask_for_gradients(device, backend, wrt):
    arguments = cast(make_grouped((3, 7), form="pair", device=device), torch.float32, wrt=wrt)
    everything = cast(arguments, torch.float32, wrt=("x", "A", "B"))
    with linlora.use_backend(backend):
        y, _ = run(arguments, None)
        expected, _ = run(everything, None)
    torch.testing.assert_close(y, expected)
    if wrt:
        (actual,) = torch.autograd.grad(y.sum(), [arguments[n] for n in wrt])
        (wanted,) = torch.autograd.grad(expected.sum(), [everything[n] for n in wrt])
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_empty_batch(device, backend):
    arguments = cast(make_grouped((0, 7), form="pair", device=device), torch.float32, wrt=("x", "A", "B"))
    with linlora.use_backend(backend):
        y, y_tangent = run(arguments, arguments["x"].detach())
    assert y.shape == y_tangent.shape == (0, 7, 8)
    gradients = torch.autograd.grad(y.sum(), [arguments[n] for n in ("x", "A", "B")])
    assert not any(gradient.any() for gradient in gradients)
