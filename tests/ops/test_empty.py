"""A dimension of 0 is like any other: shapes and gradients are those of the formulas, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linlora.kernels.grouped_problem import GroupedLoraLinear
from linlora.kernels.problem import LoraLinear

import linlora
from linlora import functional, reference
from linlora.ops import dual

SIZES = st.tuples(*[st.sampled_from([0, 3])] * 4)  # M, N, K, r
BACKENDS = st.sampled_from(["torch", "triton"])


def leaf(*shape):
    return torch.randn(shape).requires_grad_()


def agree(backend, run, oracle, leaves):
    """Both give the same, outputs and gradients; what the oracle has no gradient of has none, or zeros."""
    with linlora.use_backend(backend):
        outputs = run()
    expected = oracle()
    torch.testing.assert_close(outputs, expected)
    gradients = []
    for ys in (outputs, expected):
        loss = sum((y * y).sum() + y.sum() for y in ys if y.requires_grad)
        wanted = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients.append([torch.zeros_like(x) if g is None else g for g, x in zip(wanted, leaves, strict=True)])
    torch.testing.assert_close(*gradients)


@given(sizes=SIZES, backend=BACKENDS, form=st.sampled_from(["short", "pair"]), p=st.sampled_from([0.0, 0.5]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_lora_layers(sizes, backend, form, p):
    m, n, k, r = sizes
    x, x_tangent, W, b = leaf(2, m, k), leaf(2, m, k), leaf(n, k), leaf(n)
    A0, dA, B0, dB = leaf(r, k), leaf(r, k), leaf(n, r), leaf(n, r)
    pair = (B0, dA) if form == "pair" else (None, None)
    options = {"dropout_p": p, "seed": torch.tensor(3) if p else None}
    leaves = [x, W, b, A0, dA, B0, dB]
    layer = (x, W, b, A0, *pair, dB, 0.5)
    agree(
        backend,
        lambda: [functional.linearized_lora_linear(*layer, **options)],
        lambda: [reference.linearized_lora_linear(*layer, **options)],
        leaves,
    )
    agree(
        backend,
        lambda: functional.lora_linear(*layer, x_tangent, **options),
        lambda: reference.lora_linear(*layer, x_tangent, **options),
        [*leaves, x_tangent],
    )


@given(sizes=SIZES, backend=BACKENDS, form=st.sampled_from(["plain", "short", "pair"]), tasks=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_grouped_and_routed_layers(sizes, backend, form, tasks):
    m, n, k, r = sizes
    ids = torch.arange(2) % tasks
    x, W, b, A, B = leaf(2, m, k), leaf(n, k), leaf(n), leaf(tasks, k, r), leaf(tasks, r, n)
    point = {} if form == "plain" else {"A0": leaf(r, k)}
    if form == "pair":
        point["B0"] = leaf(n, r)
    leaves = [x, W, b, A, B, *point.values()]
    agree(
        backend,
        lambda: [functional.grouped_lora_linear(x, W, b, A, B, functional.Groups.of(ids, tasks, 2 * m), 0.5, **point)],
        lambda: [reference.grouped_lora_linear(x, W, b, A, B, ids, 0.5, **point)],
        leaves,
    )
    if r == 0:
        return  # an inventory of rank 0 is refused
    A, B = leaf(1, 3, k, r), leaf(1, 3, r, n)
    for mixture in (torch.rand(tasks, 1, 3).requires_grad_(), torch.eye(3)[None, :tasks].mT.reshape(tasks, 1, 3)):
        leaves = [x, W, b, A, B, *point.values(), *([mixture] if mixture.requires_grad else [])]
        layer = (x, W, b, A, B, mixture, 0.5, ids)
        agree(
            backend,
            lambda layer=layer: [functional.routed_lora_linear(*layer, **point)],
            lambda layer=layer: [reference.routed_lora_linear(*layer, **point)],
            leaves,
        )


@given(sizes=st.tuples(*[st.sampled_from([0, 3])] * 5), backend=BACKENDS, causal=st.booleans())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_attention(sizes, backend, causal):
    batch, queries, keys, size, values = sizes
    shapes = ((queries, size), (keys, size), (keys, values))
    primals, tangents = ([leaf(batch, 2, *shape) for shape in shapes] for _ in range(2))
    scale = 1.0 if size == 0 else None
    agree(
        backend,
        lambda: functional.attention(*primals, *tangents, causal=causal, scale=scale),
        lambda: reference.attention(*primals, *tangents, causal=causal, scale=scale),
        [*primals, *tangents],
    )


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ops_of_model_scope(backend, shape):
    x, x_tangent, width = torch.randn(2, *shape).requires_grad_(), torch.randn(2, *shape), shape[1]
    W, A0, B0 = torch.ones(5, width), torch.ones(2, width), torch.ones(5, 2)
    groups = functional.Groups.of(torch.tensor([0, 1]), 2, 2 * shape[0])
    factors = (torch.ones(2, width, 2), torch.ones(2, 2, 5))
    with linlora.use_backend(backend):
        for (y, y_tangent), out in (
            (dual.linear(x, x_tangent, W, None), 5),
            (dual.linear(x, x_tangent, torch.ones(0, width), None), 0),
            (dual.lora_linear(LoraLinear(x, W, None, A0, B0, A0, B0, 1.0, x_tangent, two_streams=True)), 5),
            (dual.grouped_lora_linear(GroupedLoraLinear(x, W, None, A0, B0, *factors, groups, 1.0, x_tangent)), 5),
            (dual.layer_norm(x, x_tangent, None, None), width),
            (dual.rms_norm(x, x_tangent, None), width),
            (dual.activation(x, x_tangent, "gelu"), width),
            (dual.gated_activation(x, None, x, x_tangent, "silu"), width),
        ):
            assert y.shape == y_tangent.shape == (2, shape[0], out)
            assert not y.any()
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert dx.shape == x.shape


def test_groups_count_rows_where_they_have_no_elements():
    A, B = torch.ones(2, 0, 1), torch.ones(2, 1, 3)
    with pytest.raises(ValueError, match=r"the groups are of 4 rows, x has 6"):
        functional.grouped_lora_linear(
            torch.ones(6, 0), torch.ones(3, 0), None, A, B, functional.Groups.of(torch.tensor([0, 1]), 2, 4), 1.0
        )
