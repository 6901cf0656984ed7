"""The ops of model scope: the reference against torch.func.jvp, then every backend against the reference in float64."""

import importlib
import itertools

import pytest
import torch
from torch.nn import functional as F

import linlora
from linlora import reference
from linlora.ops import dual
from linlora.testing import relative_error

BACKENDS = ("torch", "triton")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
KINDS = ("gelu", "gelu_tanh", "silu", "relu")
ACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def check(device):
    """check(op, oracle, backend, dtype, streams, others): y, y_t and the gradients of y, against the oracle in float64.

    `streams` are (primal, tangent or None) pairs; op(*primals and tangents as named, **others).
    """

    def check(op, oracle, backend, dtype, streams, **others):
        cast = [[None if t is None else t.to(device, dtype) for t in pair] for pair in streams]
        others = {n: _cast(t, device, dtype) for n, t in others.items()}
        leaves = [primal.requires_grad_() for primal, _ in cast]
        wide = [[None if t is None else t.detach().double() for t in pair] for pair in cast]
        exact = [primal.requires_grad_() for primal, _ in wide]
        with linlora.use_backend(backend):
            y, y_tangent = op(cast, **others)
            g = torch.randn_like(y)
            gradients = torch.autograd.grad(y, leaves, g)
        expected, expected_tangent = oracle(wide, **{n: _cast(t, device, torch.float64) for n, t in others.items()})
        exact_gradients = torch.autograd.grad(expected, exact, g.double())
        assert not y_tangent.requires_grad
        assert y.dtype == y_tangent.dtype == dtype
        assert relative_error(y, expected) < TOLERANCE[dtype]
        assert relative_error(y_tangent, expected_tangent) < TOLERANCE[dtype]
        for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
            assert relative_error(gradient, exact_gradient) < TOLERANCE[dtype]

    return check


def _cast(value, device, dtype):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def stream(*shape):
    return normal(*shape), normal(*shape)


# -- the reference against forward-mode AD ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_reference_activations(kind):
    (x, t), (up, up_t) = stream(4, 5), stream(4, 5)
    torch.testing.assert_close(reference.activation(x, t, kind), torch.func.jvp(ACT[kind], (x,), (t,)))
    expected = torch.func.jvp(lambda x, up: ACT[kind](x) * up, (x, up), (t, up_t))
    torch.testing.assert_close(reference.gated_activation(x, t, up, up_t, kind), expected)


def test_reference_norms():
    (x, t), w, b = stream(4, 5), normal(5), normal(5)
    expected = torch.func.jvp(lambda x: F.layer_norm(x, (5,), w, b, 1e-3), (x,), (t,))
    torch.testing.assert_close(reference.layer_norm(x, t, w, b, 1e-3), expected)
    expected = torch.func.jvp(lambda x: F.rms_norm(x, (5,), w, 1e-3), (x,), (t,))
    torch.testing.assert_close(reference.rms_norm(x, t, w, 1e-3), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("which", [w for w in itertools.product([False, True], repeat=3) if any(w)], ids=str)
def test_reference_attention(which, causal):
    q, k, v = normal(2, 4, 6, 5), normal(2, 2, 6, 5), normal(2, 2, 6, 3)
    tangents = [torch.randn_like(x) for x in (q, k, v)]
    zeroed = tuple(t if w else torch.zeros_like(t) for t, w in zip(tangents, which, strict=True))

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.7, enable_gqa=True)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.func.jvp(sdpa, (q, k, v), zeroed)
    given = [t if w else None for t, w in zip(tangents, which, strict=True)]
    torch.testing.assert_close(reference.attention(q, k, v, *given, causal=causal, scale=0.7), expected)


# -- the backends against the reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(check, backend, dtype):
    def op(streams, weight, bias):
        return dual.linear(*streams[0], weight, bias)

    def oracle(streams, weight, bias):
        return reference.dual_linear(*streams[0], weight, bias)

    check(op, oracle, backend, dtype, [stream(2, 7, 24)], weight=normal(33, 24, scale=0.2), bias=normal(33))
    check(op, oracle, backend, dtype, [stream(5, 24)], weight=normal(24, 33, scale=0.2).t(), bias=None)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("form", ["short", "pair"])
@pytest.mark.parametrize("tangent", [False, True], ids=["x", "x+x_tangent"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_linear_gives_the_gradient_of_the_primal(problem, backend, tangent, form, dropout_p):
    case = problem(shape=(3, 7), tangent=tangent, form=form, dropout_p=dropout_p)
    exact = case.cast(torch.float64)
    case = case.cast(torch.float32)
    names = ("x", "dB") if form == "short" else ("x", "dA", "dB")
    for name in names:
        getattr(case, name).requires_grad_()
        getattr(exact, name).requires_grad_()
    with linlora.use_backend(backend):
        y, y_tangent = dual.lora_linear(case._replace(two_streams=True))
        g = torch.randn_like(y)
        gradients = torch.autograd.grad(y, [getattr(case, n) for n in names], g)
    # y as a function of (A0 + dA, B0 + dB), evaluated at the point
    A = exact.A0 + (0 if exact.dA is None else exact.dA - exact.dA.detach())
    B = (0 if exact.B0 is None else exact.B0) + exact.dB - exact.dB.detach()
    low = reference.dropout(exact.x, exact.dropout_p, exact.seed)
    expected = F.linear(exact.x, exact.weight, exact.bias) + exact.scaling * low @ A.t() @ B.t()
    _, expected_tangent = reference.lora_linear(
        exact.x, exact.weight, exact.bias, exact.A0, exact.B0, exact.dA, exact.dB, exact.scaling, exact.x_tangent,
        dropout_p=exact.dropout_p, seed=exact.seed,
    )  # fmt: skip
    assert relative_error(y, expected) < 1e-5
    assert relative_error(y_tangent, expected_tangent) < 1e-5
    for name, gradient, wanted in zip(
        names, gradients, torch.autograd.grad(expected, [getattr(exact, n) for n in names], g.double()), strict=True
    ):
        assert relative_error(gradient, wanted) < 1e-5, name


def test_lora_linear_saves_nothing_for_the_tangent(problem):
    case = problem(shape=(50,), n=40, k=30, tangent=True).cast(torch.float32)
    case.x.requires_grad_()
    case.dA.requires_grad_()
    case.dB.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        dual.lora_linear(case._replace(two_streams=True))
    activations = [t for t in saved if t.shape[0] == 50]
    assert sorted(t.shape[1] for t in activations) == [3, 30]  # u and x itself
    assert any(t.data_ptr() == case.x.data_ptr() for t in activations)


def test_a_frozen_layer_under_autocast_keeps_its_weight_and_no_copy():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    saved = []
    keeps = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with keeps, torch.autocast("cpu", torch.bfloat16):
        y, _ = dual.linear(x, torch.randn(5, 8), weight, None)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand(5, 8), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("affine", [False, True])
def test_norms(check, backend, dtype, affine):
    w, b = (normal(40), normal(40)) if affine else (None, None)
    check(
        lambda s, weight, bias: dual.layer_norm(*s[0], weight, bias, 1e-3),
        lambda s, weight, bias: reference.layer_norm(*s[0], weight, bias, 1e-3),
        backend, dtype, [stream(3, 5, 40)], weight=w, bias=b,
    )  # fmt: skip
    check(
        lambda s, weight: dual.rms_norm(*s[0], weight, 1e-3),
        lambda s, weight: reference.rms_norm(*s[0], weight, 1e-3),
        backend, dtype, [stream(3, 5, 40)], weight=w,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(check, backend, kind, dtype):
    check(
        lambda s: dual.activation(*s[0], kind), lambda s: reference.activation(*s[0], kind),
        backend, dtype, [stream(3, 5, 7)],
    )  # fmt: skip
    for gate_t, up_t in ((True, True), (True, False), (False, True)):
        (gate, gate_tangent), (up, up_tangent) = stream(3, 35), stream(3, 35)
        check(
            lambda s: dual.gated_activation(*s[0], *s[1], kind),
            lambda s: reference.gated_activation(*s[0], *s[1], kind),
            backend, dtype, [(gate, gate_tangent if gate_t else None), (up, up_tangent if up_t else None)],
        )  # fmt: skip


ATTENTION = {
    "plain": {},
    "causal": {"causal": True},
    "long keys": {"Sk": 21, "causal": True},
    "grouped": {"Hkv": 1},
    "value size": {"Dv": 9},
    "scale": {"scale": -0.3},
    "bool mask": {"mask": "bool"},
    "additive mask": {"mask": "additive", "causal": True},
    "masked rows": {"mask": "rows"},
    "dropout": {"dropout_p": 0.3},
    "head of one": {"D": 1},
    "q alone": {"tangents": (True, False, False)},
    "v alone": {"tangents": (False, False, True), "causal": True},
    "q and v": {"tangents": (True, False, True)},
}


def attention_case(B=2, H=2, Hkv=2, Sq=17, Sk=17, D=8, Dv=8, mask=None, tangents=(True, True, True), **options):
    streams = [stream(B, H, Sq, D), stream(B, Hkv, Sk, D), stream(B, Hkv, Sk, Dv)]
    streams = [(x, t if kept else None) for (x, t), kept in zip(streams, tangents, strict=True)]
    if mask == "bool":
        options["mask"] = torch.rand(B, 1, Sq, Sk) > 0.4
        options["mask"][..., 0] = True
    elif mask == "additive":
        options["mask"] = normal(H, 1, Sk)
    elif mask == "rows":
        options["mask"] = torch.ones(B, 1, Sq, Sk, dtype=torch.bool)
        options["mask"][:, :, 3] = False
    if options.get("dropout_p"):
        options["seed"] = torch.tensor(4711)
    return streams, options


def _attention(module):
    def attention(streams, **options):
        return module.attention(*(x for x, _ in streams), *(t for _, t in streams), **options)

    return attention


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(check, backend, name):
    streams, options = attention_case(**ATTENTION[name])
    check(_attention(dual), _attention(reference), backend, torch.float32, streams, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_in_half_precision(check, backend, dtype):
    streams, options = attention_case(causal=True)
    check(_attention(dual), _attention(reference), backend, dtype, streams, **options)


@pytest.mark.parametrize("elements", [40, 700, 2**20])
def test_attention_is_the_same_in_blocks_of_any_size(check, monkeypatch, elements):
    attention = importlib.import_module("linlora.ops.aten.attention")
    monkeypatch.setitem(attention._ELEMENTS, "cpu", elements)
    monkeypatch.setattr(attention, "_ROWS", 5)
    for name in ("causal", "grouped", "bool mask", "additive mask", "dropout"):
        streams, options = attention_case(**ATTENTION[name])
        check(_attention(dual), _attention(reference), "torch", torch.float64, streams, **options)


def test_attention_forms_no_square_of_the_length():
    S, largest = 1024, 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    q = torch.randn(1, 8, S, 4, requires_grad=True)
    with Sizes(), linlora.use_backend("torch"):
        o, _ = dual.attention(q, q, q, q.detach(), q.detach(), q.detach())
        o.sum().backward()
    assert largest <= 8 * S * S / 8


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_attention(backend, shape, device):
    q = torch.randn(shape, device=device, requires_grad=True)
    with linlora.use_backend(backend):
        o, o_tangent = dual.attention(q, q, q, q.detach())
        o.sum().backward()
    assert o.shape == o_tangent.shape == q.grad.shape == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)), "batch, heads, length, head size"),
        ((torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5), torch.ones(1, 2, 3, 5)), "do not fit together"),
        ((torch.ones(1, 3, 3, 4), torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)), "multiple"),
        ((torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).half()), "one dtype"),
        ((*(torch.ones(1, 2, 3, 4),) * 3, torch.ones(1, 2, 3)), "q_tangent is"),
    ],
)
def test_attention_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        dual.attention(*arguments)


def test_attention_refuses_a_mask_that_does_not_broadcast_or_trains():
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="does not broadcast"):
        dual.attention(q, q, q, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="asks for a gradient"):
        dual.attention(q, q, q, mask=torch.ones(3, 3, requires_grad=True))


def test_wrong_shapes_are_named():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"linear: x \(2, 3\) does not fit weight \(4, 5\)"):
        dual.linear(x, x, torch.ones(4, 5), None)
    with pytest.raises(ValueError, match=r"layer_norm: x_tangent is expected like x"):
        dual.layer_norm(x, x[:1], None, None)
    with pytest.raises(ValueError, match=r"rms_norm: x \(2, 3\) does not fit weight \(4,\)"):
        dual.rms_norm(x, x, torch.ones(4))
    with pytest.raises(ValueError, match="gated_activation: up is expected"):
        dual.gated_activation(x, x, x[:1], None, "silu")
