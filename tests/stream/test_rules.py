"""Every rule against forward-mode AD of the same function in float64; the primal's gradient against autograd's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen

from linlora.stream import DualTensor, Stream, collapse

S = (3, 4, 6)
PLAIN = torch.linspace(0.5, 2.0, 72, dtype=torch.float64).view(S)
WEIGHT = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64).view(5, 6)
MASK = (torch.arange(72) % 3 == 0).view(S)
MULTI_HEAD = torch.nn.MultiheadAttention(6, 2, dtype=torch.float64, batch_first=True).requires_grad_(False)
ROTATION = torch.polar(torch.ones(3, dtype=torch.float64), torch.arange(3, dtype=torch.float64))
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


def activated_before_in_place(x):
    opened = F.relu(x)
    x += 1.0
    return opened + x


ONE = {
    "var": lambda x: x.var(-1),
    "view": lambda x: x.view(3, 24),
    "reshape": lambda x: torch.reshape(x, (12, 6)),
    "transpose contiguous": lambda x: x.transpose(0, 1).contiguous(),
    "permute flatten": lambda x: x.permute(2, 0, 1).flatten(1),
    "unflatten": lambda x: x.unflatten(-1, (2, 3)),
    "squeeze unsqueeze expand": lambda x: x.unsqueeze(1).expand(3, 2, 4, 6),
    "mT": lambda x: x.mT,
    "index": lambda x: x[:, 1:, ..., [0, 2]],
    "boolean index": lambda x: x[MASK],
    "iterate": lambda x: sum(row for row in x),
    "chunk": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "split": lambda x: x.split([1, 5], dim=-1)[1],
    "unbind": lambda x: torch.stack(x.unbind(1)),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "roll flip": lambda x: x.roll(1, 0).flip(1),
    "gather": lambda x: x.gather(1, torch.zeros(3, 2, 6, dtype=torch.long)),
    "sum": lambda x: x.sum((0, 2)),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(1),
    "float": lambda x: x.float().double(),
    "to": lambda x: x.to(torch.float32).to(torch.float64),
    "type_as": lambda x: x.type_as(PLAIN),
    "clone": lambda x: x.clone(),
    "tril": lambda x: x.tril(),
    "add scalar": lambda x: 2.0 + x + 1,
    "add plain": lambda x: torch.add(PLAIN, x, alpha=0.5),
    "sub": lambda x: 1.0 - x - PLAIN,
    "sub from plain": lambda x: PLAIN - x,
    "subtract alpha": lambda x: torch.sub(PLAIN, x, alpha=3),
    "rsub alpha": lambda x: torch.rsub(x, PLAIN, alpha=3) + torch.rsub(PLAIN, x, alpha=0.5) + torch.rsub(x, 2.0),
    "activation before in-place": lambda x: activated_before_in_place(x * 1.0),
    "by name": lambda x: torch.cat(tensors=[torch.add(input=x, other=x, alpha=2), torch.mul(x, other=PLAIN)], dim=1),
    "one by name": lambda x: torch.where(MASK, input=torch.tanh(input=x), other=torch.transpose(x, dim0=0, dim1=0)),
    "complex rotation": lambda x: torch.view_as_real(torch.view_as_complex(x.view(3, 4, 3, 2)) * ROTATION).flatten(-2),
    "neg": lambda x: -x,
    "mul": lambda x: 2.0 * x * PLAIN,
    "broadcast mul": lambda x: x * PLAIN[:1, :, :1],
    "broadcast add": lambda x: x[:1] + PLAIN,
    "div": lambda x: x / PLAIN / 3.0,
    "divide number": lambda x: 1.0 / (x + 10.0),
    "pow": lambda x: x**3 + x.pow(2),
    "float pow": lambda x: (x * x + 1.0) ** -0.5,
    "rsqrt": lambda x: torch.rsqrt(x * x + 1.0),
    "sqrt": lambda x: (x * x + 1.0).sqrt(),
    "exp log": lambda x: (x.exp() + 1.0).log(),
    "square reciprocal": lambda x: (x.square() + 1.0).reciprocal(),
    "sin cos": lambda x: x.sin() * x.cos(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "matmul weight": lambda x: x @ WEIGHT.t(),
    "plain matmul": lambda x: PLAIN @ x.mT,
    "linear": lambda x: F.linear(x, WEIGHT, WEIGHT[:, 0]),
    "addmm": lambda x: torch.addmm(WEIGHT[:, 0], x.view(-1, 6), WEIGHT.t()),
    "softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float64),
    "softmax method": lambda x: x.softmax(1),
    "layer_norm": lambda x: F.layer_norm(x, (6,), WEIGHT[0], WEIGHT[1], 1e-3),
    "layer_norm plain": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), WEIGHT[0]),
    "cat": lambda x: torch.cat([x, PLAIN, x], dim=1),
    "stack": lambda x: torch.stack([PLAIN, x]),
    "where": lambda x: torch.where(MASK, x, PLAIN),
    "where scalar": lambda x: torch.where(x > 0, x, -0.5),
    "where method": lambda x: PLAIN.where(MASK, x),
    "masked_fill": lambda x: x.masked_fill(MASK, -1.0),
    "detach": lambda x: x * x.detach(),
    "dropout off": lambda x: F.dropout(x, 0.5, training=False),
    "new_zeros": lambda x: x + x.new_ones(S),
    "attention": lambda x: F.scaled_dot_product_attention(x, PLAIN, PLAIN),
    "attention 4-D": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None] + 1.0, is_causal=True),
    "attention mask": lambda x: F.scaled_dot_product_attention(PLAIN, x, PLAIN, attn_mask=CAUSAL, scale=0.3),
    "attention grouped": lambda x: F.scaled_dot_product_attention(
        x[None].repeat(1, 2, 1, 1), x[None], PLAIN[None], enable_gqa=True
    ),
    "in-place add": lambda x: (x * 1.0).add_(PLAIN),
    "in-place operators": lambda x: _in_place(x * 1.0),
    "writes into slices of a new tensor": lambda x: _into_slices(x),
    "flatten of a broadcast tangent": lambda x: (x[:1] + PLAIN).flatten(1).view(-1).view(3, 24).view_as(PLAIN),
    "set item": lambda x: _set_item(x * 1.0),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "conv1d": lambda x: F.conv1d(x, torch.ones(2, 4, 3, dtype=torch.float64)),
    "group norm": lambda x: F.group_norm(x, 2),
    "leaky relu": F.leaky_relu,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "elu": lambda x: F.elu(x, 0.7),
    "softplus": lambda x: F.softplus(x, beta=2.0),
    "hardtanh": F.hardtanh,
    "mish": F.mish,
    "log_softmax": lambda x: x.log_softmax(1),
    "abs": torch.abs,
    "batch norm in evaluation": lambda x: F.batch_norm(x, WEIGHT[0, :4], WEIGHT[0, :4].exp(), WEIGHT[1, :4]),
    "multi-head attention": lambda x: _multi_head(x),
    "packed attention": lambda x: _varlen(x),
    "pooling and padding": lambda x: F.avg_pool1d(F.pad(x, (1, 2), value=3.0), 2),
    "transposed convolution": lambda x: F.conv_transpose1d(x, torch.ones(4, 2, 3, dtype=torch.float64), stride=2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
    "swiglu": lambda x: F.silu(x) * (x + 1.0),
    "geglu with a plain gate": lambda x: PLAIN * F.gelu(x),
    "activation used twice": lambda x: (lambda y: y * y + y)(F.silu(x)),
}  # fmt: skip
FALLBACK = {
    "an argument that the rule does not know": lambda x: torch._C._nn.elu(x, 1.0, 2.0),
    "logsumexp": lambda x: x.logsumexp(-1),
    "amax": lambda x: x.amax(-1),
    "norm": lambda x: F.normalize(x, dim=-1),
    "number to the power": lambda x: 2.0**x,
    "linear with a weight that carries": lambda x: F.linear(x, x[0], x[0, :, 0]),
    "layer norm with a weight that carries": lambda x: F.layer_norm(x, (6,), x[0, 0], x[1, 1]),
    "rms norm with a weight that carries": lambda x: F.rms_norm(x, (6,), x[0, 0]),
    "attention with a mask that carries": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x[..., :4]),
    "attention that broadcasts": lambda x: F.scaled_dot_product_attention(x, x[None], x[None] * 2.0),
    "addmm with a bias that carries": lambda x: torch.addmm(x[0, 0], x[1], WEIGHT[:, :6].T @ WEIGHT),
    "layer norm over two dimensions": lambda x: F.layer_norm(x, (4, 6)),
}


def _multi_head(x: Tensor) -> Tensor:
    return MULTI_HEAD(x, x * 2.0, x, need_weights=False)[0]


def _varlen(x: Tensor) -> Tensor:
    lengths = torch.tensor([0, 4, 12], dtype=torch.int32)
    q, k, v = (y.reshape(12, 2, 3) for y in (x, x.sin(), x.cos()))
    if type(x) is DualTensor:
        return varlen.varlen_attn(q, k, v, lengths, lengths, 8, 8, window_size=(-1, 0))
    parts = [[y[:4].transpose(0, 1) for y in (q, k, v)], [y[4:].transpose(0, 1) for y in (q, k, v)]]
    return torch.cat([F.scaled_dot_product_attention(*p, is_causal=True).transpose(0, 1) for p in parts])


def _in_place(x: Tensor) -> Tensor:
    x += PLAIN
    x *= PLAIN  # not x *= x, which PyTorch's forward mode gets wrong
    x -= 1.0
    x /= PLAIN
    return x.relu_()


def _into_slices(x: Tensor) -> Tensor:
    y, z = torch.empty(3, 4, 12, dtype=x.dtype), torch.zeros(2, *S, dtype=x.dtype)
    y[..., :6].copy_(x)
    y[..., 6:].copy_(x.exp())
    z[0][:] = x
    rows = z[1]
    rows += x
    rows[:, 1:3].mul_(x[:, 1:3])
    return torch.cat([y, z[0], z[1], rows], -1)


def _set_item(x: Tensor) -> Tensor:
    x[:, 0] = x[:, 1] * 2.0
    x[0, 2] = 1.0
    return x


def check(function, tolerance=1e-12) -> Stream:
    """The streams of function(x) against torch.func.jvp, and the gradient of the collapsed value against autograd's."""
    primal = torch.randn(S, dtype=torch.float64, requires_grad=True)
    tangent = torch.randn(S, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y, y_tangent = torch.func.jvp(function, (primal.detach(),), (tangent,))
    stream = Stream()
    result = function(DualTensor(primal, tangent, stream))
    assert isinstance(result, DualTensor)
    assert result.shape == y.shape
    assert not result.tangent.requires_grad
    torch.testing.assert_close(result.primal, y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.tangent, y_tangent, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(collapse(result), y + y_tangent, rtol=tolerance, atol=tolerance)
    g = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(collapse(result), primal, g)
    plain = primal.detach().requires_grad_()
    (expected,) = torch.autograd.grad(function(plain), plain, g)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
    return stream


@pytest.mark.parametrize("name", ONE)
def test_rule(name):
    tolerance = 1e-6 if name in ("float", "to") else 1e-12
    assert not check(ONE[name], tolerance).fallbacks


@pytest.mark.parametrize("name", FALLBACK)
def test_functions_without_a_rule_run_in_forward_mode_and_are_counted(name):
    fallbacks = check(FALLBACK[name]).fallbacks
    assert len(fallbacks) == 1
    (fallback,) = fallbacks.values()
    assert fallback.calls == 1
    assert fallback.seconds > 0


ALONG = {
    **{"topk": (2,), "kthvalue": (2,), "max": (), "min": (), "median": (), "nanmedian": (), "mode": (), "sort": ()},
    **{"cummax": (), "cummin": (), "softmax": (), "log_softmax": (), "std": (), "var": (), "sum": (), "cumsum": ()},
}


@pytest.mark.parametrize("name", ALONG)
def test_numpys_name_of_a_dimension_is_pytorchs(name):
    """In a cube, in which another dimension has the same shape."""

    def function(x):
        y = getattr(x[:, :3, :3], name)(*ALONG[name], axis=0)
        return y if isinstance(y, Tensor) else y[0]

    assert not check(function).fallbacks


@pytest.mark.parametrize("name", ["mul", "matmul", "add", "sub", "div"])
@pytest.mark.parametrize("which", ["both", "first", "second"])
def test_functions_of_two_streams(name, which):
    function = getattr(torch, name)
    a, b, a_tangent, b_tangent = (torch.randn(4, 4, dtype=torch.float64) + 3.0 for _ in range(4))
    stream = Stream()
    a_tangent, b_tangent = (a_tangent * (which != "second")), (b_tangent * (which != "first"))
    y, y_tangent = torch.func.jvp(function, (a, b), (a_tangent, b_tangent))
    arguments = [DualTensor(x, t, stream) if t.any() else x for x, t in ((a, a_tangent), (b, b_tangent))]
    result = function(*arguments)
    torch.testing.assert_close(result.primal, y)
    torch.testing.assert_close(result.tangent, y_tangent)


def test_what_is_written_reaches_every_view():
    def function(x):
        x = x * 1.0
        rows, first, last = x.view(12, 6), x.transpose(0, 1)[0], x[..., 3:]
        first.mul_(x[1, :3])
        last += x[..., :3]
        x -= PLAIN
        return torch.cat([rows, first, rows * x.view(12, 6)])

    x, tangent = torch.randn(S, dtype=torch.float64), torch.randn(S, dtype=torch.float64)
    y = function(DualTensor(x, tangent, Stream()))
    torch.testing.assert_close(y.primal, function(x))
    with torch.no_grad():  # differences, because torch.func.jvp is wrong here
        expected = (function(x + 1e-5 * tangent) - function(x - 1e-5 * tangent)) / 2e-5
    torch.testing.assert_close(y.tangent, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["group norm", "einsum", "conv1d", "logsumexp", "linear", "softmax", "layer_norm"])
def test_both_streams_have_the_dtype_that_autocast_gives(name):
    function = {
        "conv1d": lambda x: F.conv1d(x, torch.ones(2, 4, 3)),
        "linear": lambda x: F.linear(x, WEIGHT.float()),
        "layer_norm": lambda x: F.layer_norm(x, (6,)),
    }.get(name) or {**ONE, **FALLBACK, "softmax": lambda x: x.softmax(-1)}[name]
    for dtype in (torch.float32, torch.bfloat16):
        x, tangent = torch.randn(S, dtype=dtype), torch.randn(S, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = function(DualTensor(x, tangent, Stream())), function(x)
        assert y.primal.dtype == y.tangent.dtype == expected.dtype
        _, y_tangent = torch.func.jvp(lambda x: function(x.float()), (x,), (tangent,))
        assert (y.tangent - y_tangent).norm() <= 0.05 * y_tangent.norm()


def test_every_op_runs_without_a_graph_as_well():
    with torch.no_grad():
        for function in ONE.values():
            x, tangent = torch.randn(S, dtype=torch.float64), torch.randn(S, dtype=torch.float64)
            result = function(DualTensor(x, tangent, Stream()))
            assert not result.primal.requires_grad


def test_dropout_has_one_mask_for_both_streams():
    ones = torch.ones(100, 50)
    y = F.dropout(DualTensor(ones, 2.0 * ones, Stream()), 0.3)
    torch.testing.assert_close(y.primal.unique(), torch.tensor([0.0, 1 / 0.7]))
    torch.testing.assert_close(y.tangent, 2.0 * y.primal)
    assert abs((y.primal == 0).float().mean() - 0.3) < 0.03


def test_attention_dropout_has_one_mask_for_both_streams_and_backward():
    q, k = torch.randn(2, 1, 2, 8, 5, dtype=torch.float64)
    v = torch.eye(8, dtype=torch.float64).expand(1, 2, 8, 8).clone().requires_grad_()
    dual = DualTensor(v, 3.0 * v.detach(), Stream())
    y = F.scaled_dot_product_attention(q, k, dual, dropout_p=0.4)  # the probabilities themselves
    torch.testing.assert_close(y.tangent, 3.0 * y.primal.detach())
    P = y.primal.detach()
    kept = F.softmax(q @ k.mT * 5**-0.5, -1) / 0.6
    torch.testing.assert_close(P, torch.where(P == 0, 0.0, kept))
    assert 0 < (P == 0).sum() < P.numel()
    (gradient,) = torch.autograd.grad(y.primal.sum(), v)
    torch.testing.assert_close(gradient, P.mT @ torch.ones_like(P))


def test_a_random_function_without_a_rule_draws_the_same_numbers_for_both_streams():
    x = torch.randn(50, 20)
    y = F.alpha_dropout(DualTensor(x, torch.ones_like(x), Stream()), 0.5, training=True)
    dropped = y.primal == y.primal.mode().values.mode().values
    assert 0 < dropped.sum() < dropped.numel()
    assert torch.equal(y.tangent == 0, dropped)


def test_a_swiglu_runs_as_one_op(monkeypatch):
    from linlora.ops import dual

    calls = []
    monkeypatch.setattr(dual, "gated_activation", lambda *a, op=dual.gated_activation: (calls.append(a[-1]), op(*a))[1])
    x = DualTensor(torch.randn(2, 3), torch.randn(2, 3), Stream())
    F.silu(x) * (x * 2.0)
    (x * 2.0) * F.gelu(x, approximate="tanh")
    assert calls == ["silu", "gelu_tanh"]
