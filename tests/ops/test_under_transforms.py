"""No kernel runs under a transform: every functional op, forward and backward, is right there on every backend."""

import pytest
import torch
from torch.autograd import forward_ad

import linlora
from linlora import functional, reference
from linlora.functional import Groups
from linlora.ops import composed

BACKENDS = ("torch", "triton")
IDS = torch.tensor([0, 2, 1, 0])
SIZES = {"x": (4, 9), "W": (6, 9), "A0": (2, 9), "B0": (6, 2), "dA": (2, 9), "dB": (6, 2)}
STACKS = {"A": (3, 9, 2), "B": (3, 2, 6)}
SKILLS = {"A": (1, 3, 9, 2), "B": (1, 3, 2, 6), "w": (3, 1, 3)}


def _normal(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _layer(op):
    def run(module, x, W, A0, B0, dA, dB):
        return getattr(module, op)(x, W, None, A0, B0, dA, dB, 0.5)

    return SIZES, run


def _both(module, x, W, A0, B0, dA, dB, x_tangent):
    return module.lora_linear(x, W, None, A0, B0, dA, dB, 0.5, x_tangent)


def _grouped(module, x, W, A, B, A0, B0):
    groups = Groups.of(IDS, 3, 4) if module is functional else IDS
    return module.grouped_lora_linear(x, W, None, A, B, groups, 0.5, A0=A0, B0=B0)


def _routed(module, x, W, A, B, w):
    return module.routed_lora_linear(x, W, None, A, B, w, 0.5, IDS)


def _mixed(module, A, B, w):
    (mixed_A,), (mixed_B,) = module.mix_inventories([A], [B], [w])
    return mixed_A, mixed_B


def _attention(module, q, k, v, q_t, k_t, v_t):
    return module.attention(q, k, v, q_t, k_t, v_t, causal=True)


HEADS = dict.fromkeys(("q", "k", "v", "q_t", "k_t", "v_t"), (1, 2, 4, 3))
POINT = {name: SIZES[name] for name in ("A0", "B0")}
OPS = {
    "linearized_lora_linear": _layer("linearized_lora_linear"),
    "lora_linear": ({**SIZES, "x_tangent": (4, 9)}, _both),
    "grouped_lora_linear": ({"x": (4, 9), "W": (6, 9), **STACKS, **POINT}, _grouped),
    "routed_lora_linear": ({"x": (4, 9), "W": (6, 9), **SKILLS}, _routed),
    "mix_inventories": (SKILLS, _mixed),
    "attention": (HEADS, _attention),
}


@pytest.fixture(params=[(op, backend) for op in OPS for backend in BACKENDS], ids="-".join)
def case(request, monkeypatch):
    """(op, its oracle, inputs), on a backend."""
    name, backend = request.param
    monkeypatch.setattr(composed, "SMALL", 0)
    shapes, run = OPS[name]
    values = _normal(shapes)

    def of(module):
        def op(*tensors):
            y = run(module, **dict(zip(values, tensors, strict=True)))
            return y if isinstance(y, tuple) else (y,)

        return op

    with linlora.use_backend(backend):
        yield of(functional), of(reference), tuple(values.values())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_forward_and_reverse_mode(case):
    op, oracle, inputs = case
    tangents = tuple(torch.randn_like(t) for t in inputs)
    every = tuple(range(len(inputs)))

    def through(function):
        def loss(*tensors):
            return sum(y.sin().sum() for y in function(*tensors))

        gradient = torch.func.grad(loss, argnums=every)
        return torch.func.jvp(function, inputs, tangents), torch.func.jvp(gradient, inputs, tangents)

    close(through(op), through(oracle))


def test_vmap_over_the_first_input(case):
    op, oracle, (first, *others) = case
    stacked = torch.stack([first, 2.0 * first, -first])
    run = [torch.func.vmap(lambda t, f=f: f(t, *others))(stacked) for f in (op, oracle)]
    close(*run)


def test_a_graph_from_before_has_the_tangent_of_its_gradient(case):
    """Forward over reverse, by a dual cotangent; the backward is linear in it."""
    op, oracle, inputs = case
    results = []
    for function in (op, oracle):
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        with forward_ad.dual_level():
            cotangents = [forward_ad.make_dual(torch.ones_like(y), y.detach()) for y in outputs]
            gradients = torch.autograd.grad(outputs, leaves, cotangents)
            results.append([tuple(forward_ad.unpack_dual(g)) for g in gradients])
    close(*([(primal, tangent) for primal, tangent in each] for each in results))


def test_a_batch_of_cotangents(case):
    """By torch.func it is right; autograd's own batches, which are no transform, are refused."""
    op, oracle, inputs = case
    results = []
    for function in (op, oracle):
        outputs, pull_back = torch.func.vjp(function, *inputs)
        cotangents = tuple(torch.stack([torch.ones_like(y), y, -y]) for y in outputs)
        results.append(torch.func.vmap(pull_back)(cotangents))
    close(*results)


def recorded(case, monkeypatch, **options):
    op, _, inputs = case
    monkeypatch.setattr("linlora.ops.routed_lora_linear.activations_pay", lambda *_, **__: False)
    leaves = [t.clone().requires_grad_() for t in inputs]
    outputs = op(*leaves)
    cotangents = [torch.ones(1, *y.shape) if options.get("is_grads_batched") else torch.ones_like(y) for y in outputs]
    torch.autograd.grad(outputs, leaves, cotangents, **options)


def test_a_backward_that_is_recorded_is_refused(case, monkeypatch):
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        recorded(case, monkeypatch, create_graph=True)


def test_autograds_own_batches_of_cotangents_are_refused(case, monkeypatch):
    with pytest.raises(RuntimeError, match=r"takes one cotangent, not a batch.*torch\.func\.vmap"):
        recorded(case, monkeypatch, is_grads_batched=True)
