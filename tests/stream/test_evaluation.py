"""Training and evaluation see one function F, whatever no_grad blocks a network has."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import linlora


class Net(nn.Module):
    """A network that uses a scale that it computes of its hidden state, in a block of its own."""

    def __init__(self, scale):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 5)
        self.scale = scale

    def forward(self, x):
        hidden = self.a(x).tanh()
        return self.b(hidden * self.scale(self, hidden))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def block(net, hidden):
    with torch.no_grad():
        return hidden.abs().amax(-1, keepdim=True)


@torch.no_grad()
def decorated(net, hidden):
    return hidden.abs().amax(-1, keepdim=True)


def switched(net, hidden):
    torch.set_grad_enabled(False)
    scale = hidden.exp()
    torch.set_grad_enabled(True)
    return scale


def with_an_adapter(net, hidden):
    with torch.no_grad():
        return net.c(hidden)


def with_gradients_again(net, hidden):
    with torch.no_grad(), torch.enable_grad():
        return hidden.exp()


def with_a_plain_start(net, hidden):
    with torch.no_grad():
        scale = net.c(torch.ones(4, 5, dtype=torch.float64))
    return scale + block(net, hidden)


BLOCKS = {
    function.__name__: function
    for function in (block, decorated, switched, with_an_adapter, with_gradients_again, with_a_plain_start)
} | {"detach": lambda net, hidden: hidden.detach().exp()}


def linearized(scale, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["a", "b", "c"], **options)
    model = get_peft_model(Net(scale), config).double().eval()
    linlora.linearize(model, scope="model")
    weights = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    for weight in weights:
        nn.init.normal_(weight, std=0.5)
    return model, weights, torch.randn(4, 6, dtype=torch.float64)


@pytest.mark.parametrize("name", BLOCKS)
def test_training_evaluation_and_the_gradient_are_of_one_function(name):
    model, weights, x = linearized(BLOCKS[name])
    trained = model(x)
    assert torch.is_grad_enabled()
    for evaluation in (torch.no_grad, torch.inference_mode):
        with evaluation():
            evaluated = model(x)
            assert not torch.is_grad_enabled()
        assert not evaluated.requires_grad
        torch.testing.assert_close(evaluated.clone(), trained.detach(), rtol=0, atol=0)
    g = torch.randn_like(trained)
    gradients = torch.autograd.grad(trained, weights, g, allow_unused=True)
    along = sum((w * d).sum() for w, d in zip(weights, gradients, strict=True) if d is not None)
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        change = ((trained - model(x)) * g).sum()
    torch.testing.assert_close(change, along.detach())


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_with_blocks_that_is_called_past_its_hooks_is_f_or_refused(grad):
    class Inline(Net):
        def forward(self, x):
            hidden = self.a(x).tanh()
            with torch.no_grad():
                scale = hidden.abs().amax(-1, keepdim=True)
            return self.b(hidden * scale)

        def predict(self, x):
            with torch.no_grad():
                return self.scale(self, self.a(x).tanh())

    torch.manual_seed(0)
    model = get_peft_model(Inline(lambda net, hidden: net.b(hidden)), LoraConfig(r=2, target_modules=["a", "b"]))
    linlora.linearize(model.double(), scope="model")
    net, x = model.get_base_model(), torch.randn(4, 6, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        if grad:
            torch.testing.assert_close(net.forward(x).detach(), model(x).detach())
        else:
            with pytest.raises(linlora.TangentError, match=r"call the model, model\(\.\.\.\)"):
                net.forward(x)
        assert net.predict(x).detach().shape == (4, 3)


def test_a_custom_function_is_refused_in_evaluation_too():
    model, _, x = linearized(lambda net, hidden: Straight.apply(hidden))
    with pytest.raises(linlora.TangentError, match="autograd Function Straight"):
        model(x)
    with torch.no_grad(), pytest.raises(linlora.TangentError, match="autograd Function Straight"):
        model(x)


def test_statistics_that_a_network_keeps_without_gradients_are_of_the_primal():
    def scale(net, hidden):
        with torch.no_grad():
            net.mean.lerp_(hidden.mean(0), 0.5)
        return net.mean

    model, _, x = linearized(scale)
    net = model.get_base_model()
    kept = []
    for grad in (True, False):
        net.mean = torch.zeros(5, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            model(x)
        kept.append(net.mean)
    assert type(kept[0]) is type(kept[1]) is torch.Tensor
    assert torch.equal(*kept)


def test_an_error_leaves_the_grad_mode_as_it_was():
    def fails(net, hidden):
        raise KeyError("inside")

    model, _, x = linearized(fails)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(KeyError):
                model(x)
            assert torch.is_grad_enabled() == grad
    model.get_base_model().scale = block
    assert model(x).requires_grad


def test_an_interrupt_in_evaluation_does_not_stop_training():
    def interrupted(net, hidden):
        raise KeyboardInterrupt

    model, weights, x = linearized(interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(x)
    model.get_base_model().scale = block
    model(x).sum().backward()
    assert any(weight.grad is not None for weight in weights)


def test_a_module_trained_beside_the_adapter_records_nothing_in_evaluation():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"])
    model = get_peft_model(Net(block), config)
    linlora.linearize(model, scope="model")
    with torch.no_grad():
        assert not model(torch.randn(4, 6)).requires_grad
    assert model(torch.randn(4, 6)).requires_grad
