"""What the stream cannot follow raises and says where; what is constant stays constant."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from linlora.stream import DualTensor, Stream, TangentError


def dual(*shape, requires_grad=True):
    x = torch.randn(*shape or (3, 4), requires_grad=requires_grad) * 1.0
    return DualTensor(x, torch.randn(*shape or (3, 4)), Stream())


class Inner(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Outer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), Inner(function)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@torch.library.custom_op("linlora_tests::double", mutates_args=())
def custom_double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def in_place_on_an_expanded_tensor(x):
    rows = x[:1].expand(3, 4)
    x += 1.0
    return rows


@torch.jit.script
def scripted(x: torch.Tensor):
    return x * 2


PARAMETER = nn.Parameter(torch.zeros(3, 4))
REFUSED = {
    "custom operator": (lambda x: custom_double(x), "linlora_tests::double"),
    "autograd Function": (Straight.apply, "the autograd Function Straight"),
    "in-place on an expanded tensor": (in_place_on_an_expanded_tensor, "an expanded tensor"),
    "write into a tensor that has views": (lambda x: write_beside_a_view(x), "shares its memory"),
    "write into an array": (
        lambda x: torch.from_numpy(np.zeros((3, 4), np.float32)).copy_(x),
        "shares its memory",
    ),
    "write into a parameter": (lambda x: PARAMETER.data.copy_(x), "shares its memory"),
    "out=": (lambda x: torch.add(x, 1.0, out=torch.empty(3, 4)), "out= is not supported"),
    "item": (lambda x: x.sum().item() * x, "branch on values"),
    "numpy": (lambda x: x.numpy(), "out of the stream"),
    "resize_": (lambda x: (x * 1.0).resize_(2, 2), "cannot follow"),
    "squeeze_": (lambda x: (x * 1.0).unsqueeze_(0), "in-place result"),
    "apply_": (lambda x: (x * 1.0).apply_(abs), "changes a tensor in place"),
    "no forward derivative": (lambda x: F.embedding_bag(torch.zeros(2, 2, dtype=torch.long), x), "forward mode"),
    "loss of probabilities": (lambda x: F.nll_loss(x.log_softmax(-1), torch.tensor([0, 1, 2])), "before the softmax"),
}


def test_code_that_bypasses_torch_functions_raises():
    with pytest.raises(RuntimeError):
        scripted(dual())
    with pytest.raises(TangentError, match="bypasses torch functions"), torch._C.DisableTorchFunctionSubclass():
        dual() * 2.0


def test_in_place_is_fine_once_the_views_are_gone():
    x = dual() * 1.0
    first = x[:, :1] * 1.0
    expected = x.primal + first.primal
    x += first
    torch.testing.assert_close(x.primal, expected)


def test_a_function_without_a_rule_runs_in_place_too():
    x = dual() * 1.0
    expected, moving = x.primal.clamp(min=0.1), x.primal > 0.1
    tangent = x.tangent * moving
    assert x.clamp_(min=0.1) is x
    torch.testing.assert_close(x.primal, expected)
    torch.testing.assert_close(x.tangent, tangent)


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_the_module_and_the_reason(name):
    function, reason = REFUSED[name]
    with pytest.raises(TangentError) as error:
        Outer(function)(dual())
    assert reason in str(error.value)
    assert "module 'blocks.1'" in str(error.value)


def test_a_trainable_parameter_in_the_stream_is_refused():
    with pytest.raises(TangentError, match="modules_to_save"):
        nn.Linear(4, 4)(dual())
    with pytest.raises(TangentError, match="modules_to_save"):
        nn.LayerNorm(4)(dual())


def test_results_under_no_grad_are_constants():
    x = dual()
    with torch.no_grad():
        y = x * 2.0
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, x.primal * 2.0)


def test_evaluation_without_a_graph_keeps_the_tangent():
    x = dual(requires_grad=False)
    with torch.no_grad():
        assert isinstance(x * 2.0, DualTensor)


def test_a_pass_without_a_graph_keeps_the_tangents_of_an_earlier_one_with_a_graph():
    x = dual()
    with torch.no_grad():
        x.stream.enter(torch.zeros(1))
        assert isinstance(torch.cat([x, x]), DualTensor)


def test_functions_without_a_rule_have_tangents_in_inference_mode():
    with torch.inference_mode():
        x = dual(requires_grad=False)
        actual = x.logsumexp(-1)
    expected = (x.primal.softmax(-1) * x.tangent).sum(-1)
    torch.testing.assert_close(actual.tangent, expected)


def test_metadata_needs_no_rule_and_no_computation():
    x = dual(3, 4)
    assert (x.shape, x.size(0), x.dim(), x.ndim, len(x), x.numel()) == ((3, 4), 3, 2, 2, 3, 12)
    assert (x.dtype, x.device.type, x.requires_grad, x.is_floating_point()) == (torch.float32, "cpu", True, True)
    assert x.stride() == (4, 1)
    assert x.type() == "torch.FloatTensor"
    assert "tangent" in repr(x)
    assert {x: 1}[x] == 1
    assert not x.stream.fallbacks


def test_a_constant_function_in_place_leaves_a_zero_tangent():
    x = dual() * 1.0
    x.round_()
    assert not x.tangent.any()
    assert torch.equal(x.primal, x.primal.round())


def write_beside_a_view(x):
    buffer = torch.zeros(3, 4)
    rows = buffer.view(-1)
    buffer[:] = x
    return rows


def test_a_tensor_that_a_module_keeps_is_not_written():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.last = torch.zeros(4)

        def forward(self, x, name):
            getattr(self, name).lerp_(x.mean(0), 0.1)
            return x

    for name in ("mean", "last"):
        module = Keeps()
        with pytest.raises(TangentError, match="kept by a module"):
            module(dual(), name)
        assert type(getattr(module, name)) is torch.Tensor


def test_integers_and_booleans_are_constants_and_branches_on_them_are_those_of_the_primal():
    x = dual()
    mask = (x > 0) & (x < 1) | ~(x == 2)
    constants = mask, x.argmax(-1), *torch.where(x > 0), mask.float(), torch.zeros_like(x), x.topk(2).indices, x.int()
    assert {type(constant) for constant in constants} == {torch.Tensor}
    y = x if x.sum() > 0 else -x
    assert torch.equal(y.tangent, x.tangent if x.primal.sum() > 0 else -x.tangent)


@pytest.mark.parametrize("loss", [F.cross_entropy, F.multi_margin_loss])
def test_a_loss_is_taken_of_the_collapsed_value(loss):
    x, labels = dual(), torch.tensor([0, 1, 2])
    actual = loss(x, labels)
    assert type(actual) is torch.Tensor
    torch.testing.assert_close(actual, loss(x.primal + x.tangent, labels))


def test_fallbacks_add_up_by_module_and_function():
    model, x = Outer(lambda x: x.logsumexp(-1, keepdim=True) + x), dual()
    for _ in range(3):
        model(x)
    (fallback,) = x.stream.fallbacks.values()
    assert (fallback.module, fallback.function, fallback.calls) == ("blocks.1", "logsumexp", 3)
    assert "logsumexp in 'blocks.1': 3 calls" in str(fallback)
