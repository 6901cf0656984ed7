"""Tasks of every kind, and what routing is known to be equal to."""

import pytest
import torch
from routed_problems import PATHS, cast, check, make
from torch.nn import functional as F

from linlora import functional, reference, routing


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
