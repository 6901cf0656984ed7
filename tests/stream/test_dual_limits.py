"""What `dual` follows beyond functions of tensors: numbers of Python and writes; and what it refuses by name."""

import pytest
import torch
from forward_oracle import assert_like_func, network, pair
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import linlora
from linlora.functional import dual
from linlora.stream import TangentError
from linlora.testing import tiny_model

D = torch.float64


PYTHON = {
    "item": lambda x: x * x.mean().item(),
    "branch": lambda x: x.exp() if x.mean() > 0 else x.sin(),
    "assert": lambda x: x if torch.isfinite(x).all() else None,
    "float": lambda x: x * float(x.amax()),
    "tolist": lambda x: x * x[0].tolist()[1],
    "format": lambda x: x * len(f"{x[0, 0]:.3f}"),
}


@pytest.mark.parametrize("name", PYTHON)
def test_numbers_and_branches_of_python_are_those_of_the_primal(name):
    x, v = pair()
    output, tangent = dual(PYTHON[name], (x,), (v,))
    torch.testing.assert_close(output, PYTHON[name](x))
    shift = 1e-6
    if name in ("branch", "assert"):
        torch.testing.assert_close(
            tangent, (PYTHON[name](x + shift * v) - PYTHON[name](x - shift * v)) / (2 * shift), rtol=1e-7, atol=1e-7
        )
    else:
        torch.testing.assert_close(tangent, v * (output / x))


IN_PLACE = {
    "interleaved": lambda x: _interleave(x),
    "into zeros": lambda x: _into_zeros(x),
    "slice times a number": lambda x: _halve(x * 1.0),
    "index_add_": lambda x: torch.zeros(2, 4, dtype=D).index_add_(0, torch.tensor([0, 1, 0]), x),
    "copy_ and zero_": lambda x: torch.empty(3, 4, dtype=D).copy_(x).mul_(x) + (x * 1.0).zero_(),
}


def _interleave(x):
    y = torch.empty_like(x)
    y[..., 0::2] = x[..., 1::2].sin()
    y[..., 1::2] = x[..., 0::2] * 2
    return y.type_as(x)


def _into_zeros(x):
    y = torch.zeros(2, 3, 4, dtype=D)
    y[1] = x
    return y


def _halve(x):
    x[:, :2] *= 2
    return x


@pytest.mark.parametrize("name", IN_PLACE)
def test_writes_are_followed(name):
    net, (x, v) = network(), pair()
    assert_like_func(lambda x: IN_PLACE[name](net(x)), (x,), (v,), net)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return 3.0 * g


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x * weight

    @staticmethod
    def backward(ctx, g):
        return g, g


WEIGHT = nn.Parameter(torch.ones(4, dtype=D))
REFUSED = {
    "a custom Function": (lambda net, x: Product.apply(x, WEIGHT), "autograd Function Product"),
    "a custom Function after a weight": (lambda net, x: Product.apply(net(x), WEIGHT), "autograd Function Product"),
    "a Function that returns its input": (lambda net, x: Scale.apply(net(x)), "autograd Function Scale"),
    "no derivative": (lambda net, x: torch.floor_divide(net(x), 2.0), "floor_divide.*forward mode"),
    "numpy": (lambda net, x: net(x).numpy(), "numpy.*conversion to Python or NumPy"),
    "a custom operator": (
        lambda net, x: torch.ops.quantized.linear_dynamic(net(x), None),
        "quantized::linear_dynamic.*custom operator",
    ),
    "vmap inside": (lambda net, x: torch.vmap(torch.sin)(net(x)), "torch.vmap"),
    "a gradient inside": (lambda net, x: torch.autograd.grad(net(x).sum(), WEIGHT), "gradient taken inside"),
    "torch.func inside": (lambda net, x: torch.func.jvp(torch.sin, (net(x),), (net(x),)), "nest the transforms"),
    "jacobian": (lambda net, x: torch.autograd.functional.jacobian(torch.sin, net(x)), "gradient taken inside"),
    "hvp": (lambda net, x: torch.autograd.functional.hvp(lambda y: y.sin().sum(), x, x), "gradient taken inside"),
    "storage": (lambda net, x: torch.tensor(net(x).storage().tolist()), "storage.*conversion to Python or NumPy"),
    "out": (lambda net, x: torch.sin(net(x), out=torch.empty(3, 4, dtype=D)), "out= is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(name):
    function, message = REFUSED[name]
    net, (x, v) = network(), pair()
    with pytest.raises(TangentError, match=message) as caught:
        dual(lambda x: function(net, x), (x,), (v,))
    assert "scope=" not in str(caught.value)


def test_messages_name_the_module():
    net, (x, v) = nn.Sequential(network(), nn.Sequential(nn.Identity())), pair()
    net[1][0] = _Floor()
    with pytest.raises(TangentError, match=r"module '1.0', function '__floordiv__'.*detach\(\) its argument"):
        dual(net, (x,), (v,))


class _Floor(nn.Module):
    def forward(self, x):
        return x // 0.3


@pytest.mark.parametrize("around", ["jvp", "grad", "vmap"])
def test_transforms_around_it_are_refused(around):
    x, v = pair()

    def function(x):
        return dual(torch.sin, (x,), (v if around != "vmap" else v[0],))[0].sum()

    with pytest.raises(TangentError, match="nest the transforms"):
        torch.func.jvp(function, (x,), (v,)) if around == "jvp" else getattr(torch.func, around)(function)(x)
    with pytest.raises(TangentError, match="carries a tangent already"):
        dual(lambda x: dual(torch.sin, (x,), (v,))[0], (x,), (v,))


def test_the_callers_tensors_are_not_written():
    def function(x, y):
        x += 1.0
        x[:, 0] = 2.0
        return x * y

    (x, v), (y, _) = pair(), pair()
    before = [t.clone() for t in (x, v, y)]
    dual(function, (x, y), (v, None))
    assert all(torch.equal(a, b) for a, b in zip((x, v, y), before, strict=True))

    def write(x, y):
        y += x
        return y

    with pytest.raises(TangentError, match="shares its memory"):
        dual(write, (x, y), (v, None))
    assert type(y) is Tensor


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_linearized_model_has_tangents_at_layer_scope_and_refuses_at_model_scope(scope):
    model = tiny_model("bert", trained=True).double()
    linlora.linearize(model, scope=scope)
    x, v = torch.randn(2, 1, 5, model.config.hidden_size, dtype=D)

    def logits(x):
        return model(inputs_embeds=x).logits

    if scope == "model":
        with pytest.raises(TangentError, match="network at model scope"):
            dual(logits, (x,), (v,))
    else:
        assert_like_func(logits, (x,), (v,), model)


def large_layers(dropout):
    net = nn.Sequential(nn.Linear(600, 300), nn.SiLU(), nn.Linear(300, 600)).double()
    model = get_peft_model(net, LoraConfig(target_modules=["0", "2"], r=4, lora_dropout=dropout))
    for layer, parameter in model.named_parameters():
        if "lora_B" in layer:
            nn.init.normal_(parameter)
    linlora.linearize(model, scope="layer")
    return model, *torch.randn(2, 500, 600, dtype=D)


def test_large_layers_at_layer_scope_are_exact():
    model, x, v = large_layers(0.0)
    assert_like_func(model, (x,), (v,), model)


def test_lora_dropout_has_one_mask_for_both_streams():
    """An affine layer: its tangent is a difference of outputs under the same mask."""
    model, x, v = large_layers(0.5)

    def layer(x):
        torch.manual_seed(0)
        return model.base_model.model[0](x)

    y, y_tangent = dual(layer, (x,), (v,))
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(y_tangent.detach(), (layer(x + v) - layer(x)).detach())
