"""What the autograd Functions keep, and how they behave under transforms, compile, checkpointing and autocast."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import linlora
from linlora import functional, reference
from linlora.testing import relative_error

OPS = ("linearized_lora_linear", "lora_linear")


def saved_elements(function) -> int:
    """Elements of distinct storages that autograd saves while `function` runs."""
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (seen.update({t.untyped_storage().data_ptr(): t.numel()}), t)[1], lambda t: t
    ):
        graph = function()  # alive until the tensors are counted
    del graph
    return sum(seen.values())


MASKS = pytest.mark.parametrize(("backend", "mask"), [("torch", 64 * 40), ("triton", 1)])
"""What dropout saves: composed calls the mask, a byte an element, kernels the seed."""


@MASKS
def test_forward_saves_the_low_rank_products_and_nothing_else_of_the_size_of_x_or_w(problem, backend, mask):
    case = problem(shape=(64,), n=48, k=40, rank=2, form="short", dropout_p=0.5).cast(torch.float32)
    case.require_grad(("dB",))
    own = sum(t.numel() for t in (case.weight, case.A0, case.dB)) + mask
    with linlora.use_backend(backend):
        assert saved_elements(lambda: case.call("linearized_lora_linear", functional)) == own + 64 * 2


@MASKS
def test_pair_form_saves_x_by_reference_and_one_low_rank_product(problem, backend, mask):
    case = problem(shape=(64,), n=48, k=40, rank=2, dropout_p=0.5).cast(torch.float32).require_grad(("dA", "dB"))
    own = sum(t.numel() for t in (case.x, case.weight, case.A0, case.B0, case.dA, case.dB)) + mask
    with linlora.use_backend(backend):
        assert saved_elements(lambda: case.call("linearized_lora_linear", functional)) == own + 64 * 2


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_saved_when_no_gradient_is_needed(problem, op):
    case = problem()
    assert saved_elements(lambda: case.call(op, functional)) == 0
    case.require_grad(("dA", "dB"))
    with torch.no_grad():
        assert saved_elements(lambda: case.call(op, functional)) == 0
        assert not case.call(op, functional)[0].requires_grad


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["short", "pair"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_in_one_graph_with_the_same_gradients(problem, op, form, backend):
    case = problem(form=form, dropout_p=0.3, tangent=op == "lora_linear").cast(torch.float32)
    case.require_grad(("x", "A0", "B0", "dA", "dB"))
    compiled = torch.compile(lambda: case.call(op, functional), fullgraph=True, backend="aot_eager")
    leaves = [t for t in case.leaves().values() if t.requires_grad]
    results = []
    with linlora.use_backend(backend):
        for function in (compiled, lambda: case.call(op, functional)):
            outputs = function()
            results.append([*outputs, *torch.autograd.grad([y.sin().sum() for y in outputs], leaves)])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", ["short", "pair"])
@pytest.mark.parametrize("rows", [1, 64], ids="{} rows".format)
def test_inference_compiles_in_one_graph(problem, op, form, rows):
    """The factors of many rows are laid side by side, for which eager code looks at their memory."""
    case = problem(shape=(rows,), rank=2, form=form, tangent=op == "lora_linear").cast(torch.float32)
    compiled = torch.compile(lambda: case.call(op, functional), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(), case.call(op, functional))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_mask(problem, op, reentrant):
    case = problem(dropout_p=0.5).require_grad(("x", "dA", "dB"))

    def layer(x):
        seed = torch.randint(2**31, (), device=x.device)
        return getattr(functional, op)(
            x, case.weight, case.bias, case.A0, case.B0, case.dA, case.dB, 0.75, dropout_p=0.5, seed=seed
        )  # fmt: skip

    results = []
    for run in (lambda: checkpoint(layer, case.x, use_reentrant=reentrant), lambda: layer(case.x)):
        torch.manual_seed(7)
        y = run()
        y = y[0] + y[1] if isinstance(y, tuple) else y
        results.append((y, *torch.autograd.grad(y.sin().sum(), [case.x, case.dB]))) if not reentrant else (
            y.sin().sum().backward(),
            results.append((y, case.x.grad.clone(), case.dB.grad.clone())),
            case.x.grad.zero_(),
            case.dB.grad.zero_(),
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_jvp_has_the_tangent_of_every_input(problem, op, compiled):
    case = problem(tangent=op == "lora_linear")
    primals = tuple(case.leaves().values())
    tangents = tuple(torch.randn_like(t) for t in primals)

    def through(module):
        function = getattr(module, op)

        def layer(x, weight, bias, A0, B0, dA, dB, *x_tangent):
            return function(x, weight, bias, A0, B0, dA, dB, 0.75, *x_tangent)

        return lambda: torch.func.jvp(layer, primals, tangents)

    run = through(functional)
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")() if compiled else run()
    torch.testing.assert_close(actual, through(reference)())
    streams = actual[1] if isinstance(actual[1], tuple) else (actual[1],)
    assert all(stream.norm() > 0 for stream in streams)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_grad_vjp_vmap_and_their_nesting(problem, op, backend):
    case = problem(shape=(4, 3))

    def loss(module, x, dA, dB):
        outputs = getattr(module, op)(x, case.weight, case.bias, case.A0, case.B0, dA, dB, 0.75)
        return sum(y.sin().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

    def per_sample_gradients(module):
        gradients = torch.func.grad(lambda *a: loss(module, *a), argnums=(1, 2))
        return torch.func.vmap(gradients, in_dims=(0, None, None))(case.x, case.dA, case.dB)

    def hessian(module):
        return torch.func.hessian(lambda dB: loss(module, case.x, case.dA, dB))(case.dB)

    def pullback(module):
        return torch.func.vjp(lambda x: loss(module, x, case.dA, case.dB), case.x)[1](
            torch.ones((), dtype=torch.float64, device=case.x.device)
        )

    with linlora.use_backend(backend):
        for transform in (per_sample_gradients, hessian, pullback):
            torch.testing.assert_close(transform(functional), transform(reference))


@pytest.mark.parametrize("op", OPS)
def test_dual_numbers_outside_of_torch_func(problem, op):
    case = problem()
    direction = torch.randn_like(case.dB)
    with forward_ad.dual_level():
        case = case._replace(d_expand=forward_ad.make_dual(case.dB, direction))
        tangents = [forward_ad.unpack_dual(y).tangent for y in case.call(op, functional)]
    expected = 0.75 * (case.x @ case.A0.t()) @ direction.t()
    torch.testing.assert_close(tangents[-1], expected)


@pytest.mark.parametrize("op", OPS)
def test_double_backward_raises_instead_of_dropping_terms(problem, op):
    case = problem().require_grad(("x", "dB"))
    loss = sum(y.sum() for y in case.call(op, functional))
    with pytest.raises(RuntimeError, match=f"{op}.*create_graph"):
        torch.autograd.grad(loss, case.x, create_graph=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(problem, op, backend, device):
    case = problem(shape=(24,), n=32, k=48, rank=8).cast(torch.float32).require_grad(("x", "dA", "dB"))
    with torch.autocast(device, torch.bfloat16), linlora.use_backend(backend):
        outputs = case.call(op, functional)
    expected = case.call(op, reference)
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    leaves = [case.x, case.dA, case.dB]
    gradients = torch.autograd.grad([y.sum() for y in outputs], leaves)
    exact = torch.autograd.grad([y.sum() for y in expected], leaves)
    for actual, wanted in zip([*outputs, *gradients], [*expected, *exact], strict=True):
        assert relative_error(actual, wanted) < 1.5e-2
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_plain_lora_is_a_case_of_the_op(problem, backend):
    case = problem(form="short").cast(torch.float32).require_grad(("x", "A0", "dB"))
    with linlora.use_backend(backend):
        (y,) = case.call("linearized_lora_linear", functional)
    expected = case.x @ case.weight.t() + case.bias + 0.75 * (case.x @ case.A0.t()) @ case.dB.t()
    leaves = [case.x, case.A0, case.dB]
    for actual, wanted in zip(
        (y, *torch.autograd.grad(y.sin().sum(), leaves)),
        (expected, *torch.autograd.grad(expected.sin().sum(), leaves)),
        strict=True,
    ):
        assert relative_error(actual, wanted) < 1e-5
