"""The contract of `linlora.functional.dual`."""

import copy
import gc
from collections import deque, namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from forward_oracle import assert_like_func, dit_step, network, pair
from torch import Tensor, nn
from torch.nn import functional as F

from linlora import use_backend
from linlora.functional import dual
from linlora.stream import DualTensor, TangentError

D = torch.float64


def test_a_meanflow_step_is_that_of_torch_func():
    net, inputs, tangents = dit_step()
    assert_like_func(net, inputs, tangents, net)


def test_gradients_reach_inputs_as_well():
    net, (z, r, t, label), tangents = dit_step()
    z.requires_grad_(), t.requires_grad_()
    assert_like_func(net, (z, r, t, label), tangents, net)


def test_inputs_may_be_keyword_arguments():
    net, inputs, tangents = dit_step()
    names = ("z", "r", "t", "label")
    by_name = dual(net, dict(zip(names, inputs, strict=True)), dict(zip(names, tangents, strict=True)))
    for actual, expected in zip(by_name, dual(net, inputs, tangents), strict=True):
        assert torch.equal(actual, expected)


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen, self.last, self.nested = network(), [], None, {"a": ()}
        self.register_buffer("copied", None)

    def forward(self, x):
        y = self.net(x)
        self.seen.append(y)
        self.last, self.nested["a"], self.copied = y.sin(), (1, y), y * 2
        return y


CALLS = {
    "a partial": lambda net: partial(lambda net, x: net(x), net),
    "a method": lambda net: net.forward,
    "a closure": lambda net: lambda x: net(x),
    "a closure over a list": lambda net, nets=None: (lambda nets: lambda x: nets[0](x))([net]),
}


@pytest.mark.parametrize("call", [None, *CALLS])
def test_no_module_is_left_with_tensors_of_the_stream(call):
    net, (x, v) = Keeps(), pair()
    output, _ = dual(net if call is None else CALLS[call](net), (x,), (v,))
    kept = [*net.seen, net.last, net.nested["a"][1], net.copied]
    assert all(type(value) is Tensor for value in kept)
    assert torch.equal(net.seen[0], output)
    assert net.seen[0].requires_grad


def test_whoever_else_keeps_a_tensor_has_the_primal():
    net, seen, (x, v) = network(), [], pair()
    net[1].register_forward_hook(lambda module, args, output: seen.append(output))
    dual(net, (x,), (v,))
    value = seen[0] + 1.0
    assert type(value) is Tensor
    torch.testing.assert_close(value, net[1](net[0](x)) + 1.0)
    assert seen[0].tolist() == net[1](net[0](x)).tolist()


Named = namedtuple("Named", "a b")


@dataclass
class Fields:
    a: Tensor
    b: list
    name: str = "fields"


@dataclass(frozen=True, slots=True)
class Slots:
    a: Tensor
    b: list


class Private:
    __slots__ = ("__value",)

    def __init__(self, value):
        self.__value = value

    @property
    def value(self):
        return self.__value


class Thing:
    def __init__(self, value):
        self.value, self.me = value, self


TREES = {
    "tuple": lambda y: (y, y.sum()),
    "list and dict": lambda y: [{"a": y, "b": (y * 2,)}],
    "namedtuple": lambda y: Named(y, y.exp()),
    "None and numbers": lambda y: (y, None, 3, "word"),
    "integers": lambda y: (y, y.argmax(-1), y > 0),
    "constants": lambda y: (y, torch.ones(2, dtype=D)),
    "return type": lambda y: y.max(-1),
    "nothing that moves": lambda y: y.detach(),
}


@pytest.mark.parametrize("name", TREES)
def test_trees_come_out_as_they_are(name):
    net, (x, v) = network(), pair()
    output, tangent = assert_like_func(lambda x: TREES[name](net(x)), (x,), (v,), net)
    expected = TREES[name](net(x))
    assert type(output) is type(tangent) is type(expected)


CONTAINERS = {
    "a dataclass": (lambda y: Fields(y, [y]), lambda output: output.b[0]),
    "slots": (lambda y: Slots(y, [y]), lambda output: output.b[0]),
    "a private slot": (Private, lambda output: output.value),
    "an object": (Thing, lambda output: output.me.value),
    "a set": (lambda y: {y}, lambda output: next(iter(output))),
    "a queue": (lambda y: deque([y], maxlen=2), lambda output: output[0]),
    "nested": (lambda y: Slots(y, [{"things": Thing((y,))}]), lambda output: output.b[0]["things"].value[0]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_and_objects_come_out_as_they_are(name):
    net, (x, v), (made, held) = network(), pair(), CONTAINERS[name]
    outputs = dual(lambda x: made(net(x)), (x,), (v,))
    for output, expected in zip(outputs, dual(net, (x,), (v,)), strict=True):
        assert type(output) is type(made(x))
        assert type(held(output)) is Tensor
        assert torch.equal(held(output), expected)


def test_fields_without_a_tensor_stay():
    output, tangent = dual(lambda x: Fields(x, []), *[(x,) for x in pair()])
    assert output.name == tangent.name == "fields"


@pytest.mark.parametrize(
    ("inputs", "tangents", "message"),
    [
        ((torch.ones(3, 4),), (torch.ones(4),), r"tangents\[0\].*shape of inputs\[0\], \(3, 4\), got \(4,\)"),
        ((torch.ones(3, 4),), (torch.ones(3, 4, dtype=D),), r"dtype of inputs\[0\], torch.float32, got torch.float64"),
        ((torch.ones(3, 4),), (torch.ones(3, 4, device="meta"),), r"device of inputs\[0\], cpu, got meta"),
        ((torch.ones(3, 4),), (torch.ones(3, 4, requires_grad=True),), r"tangents\[0\] asks for a gradient"),
        ((torch.arange(3),), (torch.arange(3),), r"inputs\[0\] is torch.int64, which has no tangent"),
        ((torch.ones(3),), (1.0,), r"tangents\[0\] is a float"),
        ((3.0,), (torch.ones(3),), r"inputs\[0\] is a float, which takes no tangent"),
        ((torch.ones(3),), (None, None), "structure of inputs, tuple of 1, got tuple of 2"),
        ((torch.ones(3), {"a": torch.ones(1)}), (None, {"b": None}), r"structure of inputs\[1\]"),
        ({"x": torch.ones(3)}, (torch.ones(3),), "structure of inputs"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, tangents, message):
    with pytest.raises(ValueError, match=message):
        dual(lambda *x, **y: x, inputs, tangents)


def test_inputs_are_a_tuple_or_a_mapping():
    with pytest.raises(TypeError, match="tuple of arguments or a mapping"):
        dual(torch.sin, torch.ones(3), torch.ones(3))


def test_trees_of_inputs_may_have_no_tangent_as_a_whole():
    (x, v), (y, _) = pair(), pair()
    output, tangent = dual(lambda a, b: a["x"] * b[0] * a["y"], ({"x": x, "y": y}, [y]), ({"x": v, "y": None}, None))
    torch.testing.assert_close(output, x * y * y)
    torch.testing.assert_close(tangent, v * y * y)
    output, tangent = dual(torch.sin, (x,), (None,))
    assert torch.equal(tangent, torch.zeros_like(x))


def test_weights_may_have_tangents():
    net, inputs, _ = dit_step()
    names = [name for name, _ in net.named_parameters()]
    weights = [p.detach().clone() for p in net.parameters()]
    assert_like_func(
        lambda *w: torch.func.functional_call(net, dict(zip(names, w, strict=True)), inputs),
        weights,
        [torch.randn_like(w) for w in weights],
    )


@pytest.mark.parametrize("take", ["backward", "grad", "of inputs"])
def test_backward_through_the_tangent_is_an_error(take):
    net, (x, v) = network(), pair()
    x.requires_grad_(take == "of inputs")
    output, tangent = dual(net, (x,), (v,))
    assert tangent.requires_grad
    loss = (output + tangent).square().sum()
    with pytest.raises(TangentError, match=r"detach\(\) it"):
        loss.backward() if take == "backward" else torch.autograd.grad(loss, [net[0].bias] if take == "grad" else [x])
    (output + tangent.detach()).sum().backward()


def test_without_gradients_there_is_no_graph():
    net, (x, v) = network(), pair()
    expected = dual(net, (x,), (v,))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for actual, wanted in zip(dual(net, (x,), (v,)), expected, strict=True):
                assert not actual.requires_grad
                torch.testing.assert_close(actual, wanted.detach(), check_dtype=True)
    frozen = network().requires_grad_(False)
    assert not any(y.requires_grad for y in dual(frozen, (x,), (v,)))


def test_no_grad_inside_takes_the_graph_and_keeps_the_tangent():
    net, (x, v) = network(), pair()

    def function(x):
        with torch.no_grad():
            y = net(x)
        return net(x) * y.exp() + net(y)

    output, _ = assert_like_func(function, (x,), (v,), net)
    assert output.requires_grad


LOSSES = {
    "mse": lambda y: F.mse_loss(y, torch.ones_like(y)),
    "l1": lambda y: F.l1_loss(y, torch.full_like(y, 0.3)),
    "smooth l1": lambda y: F.smooth_l1_loss(y, torch.full_like(y, 0.3)),
    "huber": lambda y: F.huber_loss(y, torch.full_like(y, 0.3)),
    "cross entropy": lambda y: F.cross_entropy(y, torch.tensor([0, 1, 2])),
    "nll": lambda y: F.nll_loss(y.log_softmax(-1), torch.tensor([0, 1, 2])),
    "kl": lambda y: F.kl_div(y.log_softmax(-1), torch.full_like(y, 0.25), reduction="batchmean"),
    "bce": lambda y: F.binary_cross_entropy(y.sigmoid(), torch.full_like(y, 0.3)),
    "bce with logits": lambda y: F.binary_cross_entropy_with_logits(y, torch.full_like(y, 0.3)),
    "cosine": lambda y: F.cosine_embedding_loss(y, torch.ones_like(y), torch.ones(3, dtype=D)),
    "written out": lambda y: (y - 1.0).square().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_inside_are_those_of_the_primal(name):
    net, (x, v) = network(), pair()
    assert_like_func(lambda x: LOSSES[name](net(x)), (x,), (v,), net)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_statistics_are_updated_once(kind):
    x, v = pair(5, 4, 6)
    norms = [kind(4, affine=True, track_running_stats=True).double() for _ in range(2)]
    output, _ = dual(norms[0], (x,), (v,))
    torch.testing.assert_close(output, norms[1](x))
    for actual, expected in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_hooks_run_once():
    net, (x, v), calls = network(), pair(), []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    net[0].register_forward_pre_hook(lambda *_: calls.append(1))
    dual(net, (x,), (v,))
    assert len(calls) == 2


@pytest.mark.parametrize("training", [False, True])
def test_dropout_has_the_mask_of_the_mode_and_of_the_seed(training):
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.4), nn.Linear(64, 3), nn.Dropout1d(0.2)).double().train(training)
    x, v = pair(5, 4)
    assert_like_func(net, (x,), (v,), net)


def test_a_broadcast_tangent_comes_out_dense():
    (x, v), (y, _) = pair(1, 4), pair()
    _, tangent = dual(lambda x: x + y, (x,), (v,))
    tangent.mul_(2.0)
    torch.testing.assert_close(tangent, 2.0 * v.expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_both_streams_the_dtypes_of_the_module(dtype):
    net, inputs, tangents = dit_step()
    net = net.float()
    inputs, tangents = (
        [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in tree]
        for tree in (inputs, tangents)
    )
    _, exact_tangent = dual(net, inputs, tangents)
    with torch.autocast("cpu", dtype):
        expected = net(*inputs)
        output, tangent = dual(net, inputs, tangents)
    assert output.dtype == tangent.dtype == expected.dtype
    assert (output - expected).norm() <= 1e-2 * expected.norm()
    assert (tangent - exact_tangent).norm() <= 5e-2 * exact_tangent.norm()
    gradients = [torch.autograd.grad(y.float().square().sum(), list(net.parameters())) for y in (output, expected)]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= 3e-2 * b.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_a_layer_norm_after_a_linear_layer(dtype):
    """Its input is of half precision then, its weights are not."""
    net, x, v = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(3, 4), torch.randn(3, 4)
    _, exact = torch.func.jvp(net, (x,), (v,))
    with torch.autocast("cpu", dtype):
        output, tangent = dual(net, (x,), (v,))
        torch.testing.assert_close(output, net(x))
    assert tangent.dtype == output.dtype
    assert (tangent - exact).norm() <= 5e-2 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gated_linear_unit_in_half_precision_has_a_tangent(dtype):
    x, v = torch.randn(2, 3, 8).to(dtype)
    outputs = dual(F.glu, (x,), (v,))
    for actual, wanted in zip(outputs, torch.func.jvp(F.glu, (x.double(),), (v.double(),)), strict=True):
        assert actual.dtype == dtype
        assert (actual - wanted).norm() <= 1e-2 * wanted.norm()


def test_sampling_of_an_image_at_given_points_is_linear():
    (image, v), grid = pair(1, 2, 6, 6), torch.rand(1, 3, 3, 2, dtype=D)
    image.requires_grad_()
    y, y_tangent = dual(partial(F.grid_sample, grid=grid, align_corners=True), (image,), (v,))
    torch.testing.assert_close(y, F.grid_sample(image, grid, align_corners=True))
    torch.testing.assert_close(y_tangent.detach(), F.grid_sample(v, grid, align_corners=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rms_norm_without_an_eps_takes_that_of_torch(dtype):
    """The inputs are small, so that eps counts; both streams are those of the eps that torch's own output has."""
    x, v = (0.05 * torch.randn(2, 3, 8)).to(dtype)
    output, tangent = dual(nn.RMSNorm(8, elementwise_affine=False), (x,), (v,))
    exact = nn.RMSNorm(8, eps=torch.finfo(torch.float32).eps, elementwise_affine=False)
    expected = torch.func.jvp(exact, (x.double(),), (v.double(),))
    for actual, wanted in zip((output, tangent), expected, strict=True):
        assert (actual - wanted).norm() <= 1e-2 * wanted.norm()


def test_four_adamw_steps_of_meanflow_give_the_weights_of_torch_func():
    net, (z, r, t, label), (v, *_) = dit_step()
    nets = [net, copy.deepcopy(net)]
    for one, derivative in zip(nets, (dual, _func_jvp), strict=True):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        for _ in range(4):
            u, u_tangent = derivative(
                partial(one, label=label), (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t))
            )
            target = (v - (t - r).view(-1, 1, 1, 1) * u_tangent).detach()
            optimizer.zero_grad()
            (u - target).square().mean().backward()
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _func_jvp(function, inputs, tangents):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.func.jvp(function, inputs, tangents)


def test_nothing_of_a_call_is_kept():
    net, inputs, tangents = dit_step()
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), DualTensor)}
    dual(net, inputs, tangents)
    assert {id(x) for x in gc.get_objects() if issubclass(type(x), DualTensor)} <= before


@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu, partial(F.gelu, approximate="tanh")])
def test_activations_by_kernels_are_those_of_torch_func(activation):
    """Alone, and in a product, which one launch computes with them."""
    layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6)])
    x, tangent = torch.randn(2, 3, 4)

    def function(x):
        return activation(layers[0](x)) * layers[1](x), activation(layers[0](x)).sum(-1)

    with use_backend("triton"):
        assert_like_func(function, (x,), (tangent,), layers, tolerance=1e-5)
