"""What a layer of composed calls, which a GPU without evidence runs, sends to the device, beside PEFT's own layer.

Counted on the meta device: aten calls that are not views, and the bytes that they read and write.
"""

import collections
import sys

import peft
import pytest
import torch
from linlora.kernels.problem import LoraLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linlora import functional, reference
from linlora.ops import dual

VIEWS = {
    "view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "detach", "slice", "select", "split",
    "_unsafe_view", "alias", "as_strided", "empty", "new_empty", "empty_like", "empty_strided", "lift_fresh",
}  # fmt: skip
M, K, N, R = 512, 2048, 2048, 16
X_BYTES = 2 * M * K


class Sent(TorchDispatchMode):
    """Counts calls by name, and their bytes in units of x."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name not in VIEWS:
            self.calls[name] += 1
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors) / X_BYTES
        return out

    def __repr__(self):
        return f"{self.calls.total()} calls, {self.bytes:.1f} times x: {dict(self.calls)}"


def sent(forward, *inputs):
    """What forward sends, and what its backward does."""
    with Sent() as of_forward:
        outputs = forward()
    with Sent() as of_backward:
        torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], torch.empty_like(outputs))
    return of_forward, of_backward


def tensor(*shape, dtype, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def of_peft(monkeypatch, dtype, p):
    """PEFT's layer, with the one kernel that F.dropout is on a GPU."""
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, *_: torch.native_dropout(x, p, True)[0])
    model = nn.Sequential(nn.Linear(K, N, bias=False, device="meta", dtype=torch.bfloat16))
    config = peft.LoraConfig(r=R, target_modules=["0"], lora_dropout=p)
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype is torch.float32).base_model.model[0]
    for factor in (layer.lora_A, layer.lora_B):
        assert factor["default"].weight.dtype is dtype
    x = tensor(M, K, dtype=torch.bfloat16, grad=True)
    return sent(lambda: layer(x), x, *(f["default"].weight for f in (layer.lora_A, layer.lora_B)))


def of_linlora(form, dtype, p):
    """The form of plain LoRA, A and B trained; short, dB trained; pair, dA and dB trained."""
    x, W = tensor(M, K, dtype=torch.bfloat16, grad=True), tensor(N, K, dtype=torch.bfloat16)
    pair, plain = form == "pair", form == "plain"
    A0, dB = tensor(R, K, dtype=dtype, grad=plain), tensor(N, R, dtype=dtype, grad=True)
    B0, dA = (tensor(N, R, dtype=dtype), tensor(R, K, dtype=dtype, grad=True)) if pair else (None, None)
    layer = lambda: functional.linearized_lora_linear(x, W, None, A0, B0, dA, dB, 2.0, dropout_p=p)  # noqa: E731
    return sent(layer, *(t for t in (x, A0, dA, dB) if t is not None))


def of_both_streams(p):
    """The pair form of model scope, dA and dB trained."""
    (x, x_tangent), W = (tensor(M, K, dtype=torch.bfloat16) for _ in range(2)), tensor(N, K, dtype=torch.bfloat16)
    A0, dA = (tensor(R, K, dtype=torch.float32, grad=grad) for grad in (False, True))
    B0, dB = (tensor(N, R, dtype=torch.float32, grad=grad) for grad in (False, True))
    x.requires_grad_()
    layer = LoraLinear(x, W, None, A0, B0, dA, dB, 2.0, x_tangent, p, two_streams=True)
    return sent(lambda: dual.lora_linear(layer)[0], x, dA, dB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32-factors", "bf16-factors"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("form", ["plain", "short", "pair"])
def test_a_layer_sends_no_more_than_pefts(monkeypatch, form, p, dtype):
    ours, pefts = of_linlora(form, dtype, p), of_peft(monkeypatch, dtype, p)
    for our, their in zip(ours, pefts, strict=True):
        assert our.bytes <= their.bytes, (our, their)
    more = 2 if form == "pair" and p > 0.0 else 0  # the pair form has two more products than PEFT's layer
    assert sum(of.calls.total() for of in ours) <= sum(of.calls.total() for of in pefts) + more, (ours, pefts)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_both_streams_send_less_than_twice_what_one_does(p):
    """Model scope at a pair, from a tangent, beside plain LoRA, whose backward it shares."""
    both, one = of_both_streams(p), of_linlora("plain", torch.float32, p)
    assert both[0].calls["mm"] + both[0].calls["addmm_"] == 6, both[0]  # W twice, low rank, x_t A0; y and y_t once
    assert both[0].bytes < 2.2 * one[0].bytes, (both, one)
    assert both[1].bytes < 1.1 * one[1].bytes, (both, one)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("op", [functional.attention, dual.attention], ids=["functional", "model scope"])
def test_a_gpu_is_sent_no_blocks_of_scores_for_a_primal_and_its_gradients(monkeypatch, op, causal, kv_heads):
    module = sys.modules["linlora.ops.aten.attention"]
    monkeypatch.setattr(module, "on_gpu", lambda x: True)
    monkeypatch.setattr(module, "_serves", lambda problem: False)
    q = torch.randn(2, 4, 9, 8, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 13, 8, requires_grad=True) for _ in range(2))
    g = torch.randn(2, 4, 9, 8)
    expected, _ = reference.attention(*(x.double() for x in (q, k, v)), causal=causal)
    tangent = torch.randn_like(q)
    with_tangent, _ = op(q, k, v, tangent, causal=causal)  # composed: the tangent needs P
    monkeypatch.setattr(module, "scores", None)
    o, _ = op(q, k, v, causal=causal)
    for found in (o, with_tangent):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(found, (q, k, v), g)
        exact = torch.autograd.grad(expected, (q, k, v), g.double(), retain_graph=True)
        for one, other in zip(gradients, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("form", ["short", "pair"])
@pytest.mark.parametrize("op", ["linearized_lora_linear", "lora_linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_a_gpu_is_sent_computes_the_layer(monkeypatch, check, problem, op, form, dropout_p, dtype):
    for module in ("dropout", "lora"):
        monkeypatch.setattr(sys.modules[f"linlora.ops.aten.{module}"], "on_gpu", lambda x: True)
    case = problem(shape=(9, 8), n=24, k=40, form=form, tangent=op == "lora_linear", dropout_p=dropout_p)
    factor_dtype = torch.float32 if dtype is torch.bfloat16 else None
    check(op, "torch", case, dtype, factor_dtype)
    check(op, "torch", case, dtype, factor_dtype, wrt=("x", "dA", "dB"))
