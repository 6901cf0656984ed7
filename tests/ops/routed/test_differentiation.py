"""The routed op is differentiable, transformable and compilable like the others."""

import pytest
import torch
from routed_problems import FORMS, PATHS, cast, leaves, make
from torch.utils.checkpoint import checkpoint

from linlora import functional, reference
from linlora.ops import mixing as mixing_forms
from linlora.testing import relative_error


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
