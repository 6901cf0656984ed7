"""Gradients of tangents: exact through every functional op, and refused where a tangent is a constant."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linlora.kernels.grouped_problem import GroupedLoraLinear
from linlora.kernels.problem import LoraLinear

import linlora
from linlora import functional, reference
from linlora.ops import dual
from linlora.testing import relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2}


@given(
    given_tangents=st.tuples(*[st.booleans()] * 3),
    used=st.sampled_from([(0,), (1,), (0, 1)]),
    options=st.fixed_dictionaries({"causal": st.booleans(), "dropout_p": st.sampled_from([0.0, 0.4])}),
    mask=st.sampled_from([None, "bool", "additive", "padding"]),
    case=st.sampled_from([("torch", torch.float64), ("torch", torch.float16), ("triton", torch.float32)]),
    queries=st.sampled_from([1, 5]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_attention_through_either_output(given_tangents, used, options, mask, case, queries):
    (backend, dtype), generator = case, torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    shapes = ((2, 4, queries, 6), (2, 2, 7, 6), (2, 2, 7, 3))
    primals = [normal(*shape) for shape in shapes]
    tangents = [normal(*shape) if has else None for shape, has in zip(shapes, given_tangents, strict=True)]
    masks = {
        None: None,
        "bool": torch.rand(queries, 7, generator=generator) < 0.5,  # some queries see no key
        "additive": normal(2, 1, queries, 7),
        "padding": torch.arange(7) < torch.tensor([3, 7]).view(2, 1, 1, 1),
    }
    options = {**options, "mask": masks[mask], "seed": torch.tensor(5) if options["dropout_p"] else None}
    narrow = [t if t is None else t.requires_grad_() for t in (*primals, *tangents)]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in narrow]
    with linlora.use_backend(backend):
        outputs = functional.attention(*narrow, **options)
    exact = {**options, "mask": options["mask"].double() if mask == "additive" else options["mask"]}
    expected = reference.attention(*wide, **exact)
    cotangents = [normal(*y.shape) for y in outputs]
    gradients = []
    for ys, inputs in ((outputs, narrow), (expected, wide)):
        loss = sum((ys[i] * cotangents[i].to(ys[i].dtype)).sum() for i in used)
        leaves = [t for t in inputs if t is not None]
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        gradients.append([torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)])
    size = max(float(g.norm()) for g in gradients[1])
    for actual, wanted in zip(*gradients, strict=True):
        assert float((actual - wanted).norm()) <= TOLERANCE[dtype] * max(float(wanted.norm()), 0.1 * size, 1e-9)


def block(x, x_tangent, W, A0, B0, dA, dB, ops):
    """Queries, keys and values by LoRA layers, attention, and an output layer, on both streams."""
    heads = []
    for i in range(3):
        y, y_tangent = ops.lora_linear(x, W[i], None, A0[i], B0[i], dA[i], dB[i], 0.5, x_tangent)
        heads.append([t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (y, y_tangent)])
    (q, q_t), (k, k_t), (v, v_t) = heads
    o, o_t = (t.transpose(1, 2).flatten(2) for t in ops.attention(q, k, v, q_t, k_t, v_t, causal=True))
    return ops.lora_linear(o, W[3], None, A0[3], B0[3], dA[3], dB[3], 0.5, o_t)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [
    ("torch", torch.float64, 1e-12), ("torch", torch.float32, 1e-5), ("triton", torch.float32, 1e-5)
])  # fmt: skip
def test_a_chain_of_functional_ops_trains_through_its_tangents(backend, dtype, tolerance):
    """The loss on y + y_tangent of a chain has the gradients that torch.func gives of the same function."""
    shapes = {"W": (4, 8, 8), "A0": (4, 2, 8), "B0": (4, 8, 2), "dA": (4, 2, 8), "dB": (4, 8, 2)}
    values = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    x, x_tangent = torch.randn(2, 5, 8, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype)

    def primal(x, A, B):  # with attention of aten's, which forward mode differentiates by itself
        W = values["W"].double()
        q, k, v = ((x @ W[i].T + 0.5 * x @ A[i].T @ B[i].T).unflatten(-1, (2, -1)).transpose(1, 2) for i in range(3))
        S = (q @ k.mT / 2).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
        o = (S.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return o @ W[3].T + 0.5 * o @ A[3].T @ B[3].T

    def oracle(dA, dB, x, x_tangent):
        point = (x, values["A0"].double(), values["B0"].double())
        y, y_tangent = torch.func.jvp(primal, point, (x_tangent, dA, dB))
        return (y + y_tangent).square().sum()

    inputs = [values["dA"], values["dB"], x, x_tangent]
    expected = torch.func.grad(oracle, argnums=(0, 1, 2, 3))(*(t.double() for t in inputs))
    leaves = [t.requires_grad_() for t in inputs]
    with linlora.use_backend(backend):
        y, y_tangent = block(x, x_tangent, ops=functional, **values)
    found = torch.autograd.grad((y + y_tangent).square().sum(), leaves)
    for actual, wanted in zip(found, expected, strict=True):
        assert relative_error(actual, wanted) < tolerance


def test_attention_keeps_nothing_more_for_a_tangent_that_is_absent():
    q = torch.randn(1, 1, 4, 3, requires_grad=True)
    o, o_tangent = functional.attention(q, q, q)
    assert not o_tangent.requires_grad
    assert not o_tangent.any()
    assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()


X = torch.ones(1, 2, 2, 3)
FACTORS = (torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3), torch.ones(3, 2))
OF_MODEL_SCOPE = {
    "linear": lambda t, x=X: dual.linear(x, t, torch.eye(3), None),
    "lora_linear": lambda t, x=X: dual.lora_linear(
        LoraLinear(x, torch.eye(3), None, *FACTORS, 1.0, t, two_streams=True)
    ),
    "grouped_lora_linear": lambda t, x=X: dual.grouped_lora_linear(GroupedLoraLinear(
        x, torch.eye(3), None, *FACTORS[:2], torch.ones(1, 3, 2), torch.ones(1, 2, 3),
        functional.Groups.of(torch.tensor([0]), 1, 4), 1.0, t,
    )),
    "layer_norm": lambda t, x=X: dual.layer_norm(x, t, None, None),
    "rms_norm": lambda t, x=X: dual.rms_norm(x, t, None),
    "activation": lambda t, x=X: dual.activation(x, t, "gelu"),
    "gated_activation": lambda t, x=X: dual.gated_activation(x, t, x, None, "silu"),
    "attention": lambda t, x=X: dual.attention(x, x, x, q_tangent=t),
}  # fmt: skip


@pytest.mark.parametrize("op", OF_MODEL_SCOPE)
def test_an_op_of_model_scope_refuses_a_tangent_that_asks_for_a_gradient(op):
    tangent = torch.ones_like(X).requires_grad_()
    with pytest.raises(ValueError, match=rf"{op}: .*tangent asks for a gradient.*linlora.functional"):
        OF_MODEL_SCOPE[op](tangent)
    with torch.no_grad():
        OF_MODEL_SCOPE[op](tangent)


@pytest.mark.parametrize("op", OF_MODEL_SCOPE)
def test_an_op_of_model_scope_refuses_transforms(op):
    with pytest.raises(NotImplementedError, match=f"{op}: an op of model scope"):
        torch.func.jvp(lambda x: OF_MODEL_SCOPE[op](torch.ones_like(X), x), (X,), (X,))


@pytest.mark.parametrize("op", sorted(set(OF_MODEL_SCOPE) - {"linear"}))
def test_an_op_of_model_scope_is_not_differentiated_twice(op):
    x = X.clone().requires_grad_()
    y, _ = OF_MODEL_SCOPE[op](torch.ones_like(X), x)
    with pytest.raises(RuntimeError, match=rf"{op}.*create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("poison", ["q", "k", "v"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_that_is_not_finite_reaches_no_more_than_in_torch(poison, backend):
    """NaN in masked keys and in padded queries: what is finite in torch's own attention is finite here, and equal."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 2, 6, 8, generator=generator) for _ in range(4))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, :, :, 4:] = False
    mask[0, :, 4:] = False
    {"q": q, "k": k, "v": v}[poison][0, :, 4:] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for function in (
        torch.nn.functional.scaled_dot_product_attention,
        lambda *a: functional.attention(*a, mask=mask)[0],
    ):
        with linlora.use_backend(backend):
            o = function(*leaves) if results else function(*leaves, attn_mask=mask)
        results.append((o, *torch.autograd.grad(o[:, :, :4], leaves, g[:, :, :4])))
    for theirs, ours in zip(*results, strict=True):
        finite = theirs.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-5)
