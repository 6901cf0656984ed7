"""Every way out of a network gives F, by torch.func.jvp over the plain PEFT model, or an error; never f(φ0)."""

import collections
import copy
import dataclasses
import io
import pickle
import threading
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import linlora
from linlora.stream import DualTensor, TangentError
from linlora.testing import randomize, tiny_batch, tiny_model


@dataclasses.dataclass(frozen=True)
class Output:
    logits: torch.Tensor


class Box:
    def __init__(self, content):
        self.content = content


Named = collections.namedtuple("Named", "logits")


def generator(y):
    yield y


CONTAINERS = {
    "tensor": (lambda y: y, lambda out: out),
    "tuple": (lambda y: (None, y), lambda out: out[1]),
    "namedtuple": (Named, lambda out: out.logits),
    "dict": (lambda y: {"logits": y}, lambda out: out["logits"]),
    "dataclass": (Output, lambda out: out.logits),
    "object": (Box, lambda out: out.content),
    "namespace": (lambda y: types.SimpleNamespace(y=y), lambda out: out.y),
    "set": (lambda y: {y}, lambda out: next(iter(out))),
    "deque": (lambda y: collections.deque([y]), lambda out: out[0]),
    "generator": (generator, next),
    "closure": (lambda y: lambda: y, lambda out: out()),
    "nested": (lambda y: [{"a": (Output(Box(y)),)}], lambda out: out[0]["a"][0].logits.content),
}


def saved_and_loaded(y):
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return torch.load(file)


def added_to_in_place(y):
    y = y.clone()
    y += 1.0
    return y - 1.0


READ_OUTS = {
    "detach": lambda y: y.detach(),
    "data": lambda y: y.data,
    "clone": lambda y: y.clone() * 1.0,
    "numpy": lambda y: torch.from_numpy(y.detach().cpu().numpy()),
    "array": lambda y: torch.from_numpy(np.asarray(y.detach())),
    "tolist": lambda y: torch.tensor(y.tolist(), dtype=y.dtype),
    "item": lambda y: torch.tensor([[e.item() for e in row] for row in y], dtype=y.dtype),
    "float": lambda y: torch.tensor([[float(e.detach()) for e in row] for row in y], dtype=y.dtype),
    "format": lambda y: torch.tensor([[float(f"{e.detach():.15f}") for e in row] for row in y], dtype=y.dtype),
    "copy": lambda y: copy.copy(y) * 1.0,
    "deepcopy": lambda y: copy.deepcopy(y.detach()) * 1.0,
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "save": saved_and_loaded,
    "dlpack": lambda y: torch.from_dlpack(y.detach()),
    "rows": lambda y: torch.stack(list(y)).detach(),
    "views": lambda y: y.view(-1)[:].reshape(y.shape).detach(),
    "cat": lambda y: torch.cat([y, torch.zeros_like(y)])[: len(y)].detach(),
    "in place": added_to_in_place,
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 5), nn.Linear(5, 5), nn.LayerNorm(5)
        self.result, self.kept = (lambda y: y), None

    def features(self, x):
        return self.norm(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def forward(self, x):
        self.kept = self.features(x)
        return self.result(self.kept)


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def plain_model():
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["first", "second"])).double().eval()
    randomize(model, 1, scale=0.5)
    return model


def linearized_model(result=lambda y: y):
    model = plain_model()
    linlora.linearize(model, scope="model")
    randomize(model, 2, ("lora_dA", "lora_dB"), 0.3)
    model.get_base_model().result = result
    return model


def oracle(model):
    """F and, by name in `model`, the leaves its gradients belong to: torch.func.jvp over the plain PEFT model."""
    plain = plain_model()
    point = {name: p.detach() for name, p in plain.named_parameters() if "lora_" in name}
    names = {name: name.replace(".lora_", ".lora_d").replace(".weight", "") for name in point}
    delta = {name: model.get_parameter(names[name]).detach().clone().requires_grad_() for name in point}
    f, tangent = torch.func.jvp(lambda p: torch.func.functional_call(plain, p, (X,)), (point,), (delta,))
    return f + tangent, {names[name]: leaf for name, leaf in delta.items()}


def in_a_thread(model):
    results = []
    thread = threading.Thread(target=lambda: results.append(model.get_base_model().forward(X)))
    thread.start()
    thread.join()
    return results[0]


CALLS = {
    "model()": lambda model: model(X),
    "model.forward()": lambda model: model.forward(X),
    "LoraModel.forward()": lambda model: model.base_model.forward(X),
    "base()": lambda model: model.get_base_model()(X),
    "base.forward()": lambda model: model.get_base_model().forward(X),
    "a method": lambda model: model.get_base_model().result(model.get_base_model().features(X)),
    "a thread": in_a_thread,
    "what a module keeps": lambda model: (model(X), model.get_base_model().result(model.get_base_model().kept))[1],
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("call", CALLS)
def test_what_leaves_the_network_is_f_with_its_gradient(call, container):
    into, out_of = CONTAINERS[container]
    model = linearized_model(into)
    expected, leaves = oracle(model)
    for name, read in READ_OUTS.items():
        actual = read(out_of(CALLS[call](model)))
        assert type(actual) is torch.Tensor, name
        torch.testing.assert_close(actual.detach(), expected.detach(), msg=name)
    parameters = [model.get_parameter(name) for name in leaves]
    actual = torch.autograd.grad(out_of(CALLS[call](model)).sin().sum(), parameters)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sin().sum(), list(leaves.values())))


FROM_HOOKS = {
    "mean of a row": (lambda y: y[0].mean().item(), lambda F: F[0].mean().item()),
    "norm": (lambda y: y.detach().norm(), lambda F: F.norm()),
    "Gram matrix": (lambda y: y.detach().T @ y.detach(), lambda F: F.T @ F),
    "active": (lambda y: (y > 0).double().mean(), lambda F: (F > 0).double().mean()),
    "predictions": (lambda y: y.argmax(-1), lambda F: F.argmax(-1)),
    "indices": (lambda y: y.topk(2).indices, lambda F: F.topk(2).indices),
    "counted": (lambda y: (y.detach() > 0).nonzero(), lambda F: (F > 0).nonzero()),
    "branch": (lambda y: bool((y.detach() > 0)[0, 0]), lambda F: bool(F[0, 0] > 0)),
    "masked": (lambda y: y.detach()[y.detach() > 0], lambda F: F[F > 0]),
    "in place": (lambda y: y.detach().clone().relu_(), lambda F: F.relu()),
    "rounded": (lambda y: y.round(), lambda F: F.round()),
    "loss": (lambda y: nn.functional.mse_loss(y, torch.ones_like(y)).item(), lambda F: (F - 1).square().mean().item()),
} | {name: (read, lambda F: F) for name, read in READ_OUTS.items()}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FROM_HOOKS)
def test_what_a_hook_takes_is_of_f(name, mode):
    take, of_f = FROM_HOOKS[name]
    model, kept = linearized_model(), []
    expected = of_f(oracle(model)[0].detach())
    model.get_base_model().norm.register_forward_hook(lambda module, args, output: kept.append(take(output)))
    with mode():
        model(X)
    actual = kept[0].detach() * 1 if isinstance(kept[0], torch.Tensor) else kept[0]
    torch.testing.assert_close(actual, expected)


def test_a_hook_that_steers_stays_in_the_network():
    def steer(module, args, output):
        return torch.where(output > 0, output, 0.1 * output) + 0.5 * output.detach()

    def replaced(network):  # with detach(), the gradient of f is that of the first term alone
        network.norm.register_forward_hook(steer)
        return network

    model, plain = linearized_model(), plain_model()
    replaced(model.get_base_model()), replaced(plain.get_base_model())
    actual = torch.autograd.grad(model(X).sum(), [p for p in model.parameters() if p.requires_grad])
    expected = torch.autograd.grad(plain(X).sum(), [p for p in plain.parameters() if p.requires_grad])
    torch.testing.assert_close(actual, expected)


def test_predictions_among_the_outputs_are_those_of_f():
    model = linearized_model(lambda y: {"logits": y, "predictions": y.argmax(-1), "kept": y.detach()})
    outputs = model(X)
    assert all(type(x) is torch.Tensor for x in outputs.values())
    assert torch.equal(outputs["predictions"], outputs["logits"].argmax(-1))
    torch.testing.assert_close(outputs["kept"], outputs["logits"].detach())


def test_a_hook_that_writes_into_a_plain_tensor_is_told_what_to_write():
    model, total = linearized_model(), torch.zeros(5, dtype=torch.float64)
    model.get_base_model().norm.register_forward_hook(lambda m, args, y: total.add_(y.detach().sum(0)) and None)
    with pytest.raises(TangentError, match="x = x \\+ y in place of x \\+= y"):
        model(X)


def squared(y):
    return (y - 1.0).square().mean()


LOSSES = {
    "a tuple": lambda y: (squared(y), y),
    "a number": squared,
    "a number with a dimension": lambda y: (squared(y)[None], y),
    "a dataclass": lambda y: Output(squared(y)),
    "a dict": lambda y: {"loss": squared(y), "logits": y},
    "a term of another name": lambda y: {"aux": squared(y), "logits": y},
    "one a row": lambda y: {"logits": y, "distillation_loss": y.square().mean(-1)},
    "one a task": lambda y: (torch.stack([squared(y), squared(y + 1.0)]) * torch.tensor([0.5, 2.0], dtype=y.dtype), y),
    "a sum with a known loss": lambda y: (nn.functional.mse_loss(y, torch.ones_like(y)) + 0.1 * squared(y), y),
    "an object": lambda y: Box(squared(y)),
    "one of probabilities": lambda y: (-y.log_softmax(-1)[:, 0]).sum(),
}


@pytest.mark.parametrize("output", LOSSES)
def test_a_loss_of_unknown_make_is_refused_in_every_form(output):
    model = linearized_model(LOSSES[output])
    with pytest.raises(TangentError, match="does not know as losses"):
        getattr(model(X), "content", None).sum()


@pytest.mark.parametrize("output", [name for name in LOSSES if name not in ("one a row", "one a task")])
def test_a_loss_that_passes_the_hooks_is_refused_where_it_is_used(output):
    out = linearized_model(LOSSES[output]).get_base_model().forward(X)
    out = out[0] if isinstance(out, tuple) else next(iter(out.values())) if isinstance(out, dict) else out
    with pytest.raises(TangentError, match="does not know as losses"):
        getattr(out, "logits", getattr(out, "content", out)).backward()


@pytest.mark.parametrize(
    "result",
    [lambda y: y[:1, :1], lambda y: y[0, 0], lambda y: y[:1, :1].squeeze(), lambda y: y.mean((0, 1), keepdim=True)],
    ids=["one row of one", "an element", "squeezed", "a mean with dimensions"],
)
def test_a_number_that_is_no_loss_is_an_output(result):
    model = linearized_model(result)
    torch.testing.assert_close(model(X), result(oracle(model)[0]), check_stride=False)
    model.get_base_model().result = lambda y: (nn.functional.mse_loss(y, torch.ones_like(y)), y)
    loss, y = model(X)
    torch.testing.assert_close(loss, squared(y))


def test_inputs_that_ask_for_a_gradient_get_none_and_parameters_theirs():
    model, x = linearized_model(), X.clone().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(X).sin().sum(), parameters)
    for call in (model, model.forward, model.get_base_model().forward, model.get_base_model().features):
        torch.testing.assert_close(torch.autograd.grad(call(x * 1.0).sin().sum(), parameters), expected)
        with pytest.raises(TangentError, match="inputs ask for a gradient"):
            call(x * 1.0).sum().backward()


@pytest.mark.parametrize("call", ["__call__", "forward"])
def test_checkpointing_with_embeddings_that_ask_for_gradients_trains(call):
    model, batch, gradients = tiny_model("llama", trained=True), tiny_batch("llama"), []
    linlora.linearize(model, scope="model")
    randomize(model, 5, ("lora_dA", "lora_dB"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        outputs = getattr(model.get_base_model().model, call)(**batch, use_cache=False)
        gradients.append(torch.autograd.grad(outputs[0].sin().sum(), parameters))
        outputs = getattr(model.get_base_model().model, call)(**batch, use_cache=False)
        outputs[0].sum().backward()  # also to the embeddings, whose gradients nobody reads
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap])
def test_transforms_are_refused_with_the_remedy(transform):
    model = linearized_model(lambda y: y.sum(0, keepdim=True))
    parameters = {name: p.detach()[None].clone() for name, p in model.named_parameters() if p.requires_grad}

    def output(p):
        p = {name: value.reshape(model.get_parameter(name).shape) for name, value in p.items()}
        return torch.func.functional_call(model, p, (X,)).sum()

    with pytest.raises(TangentError, match=r"linlora\.functional\.jvp and vjp"):
        transform(output)(parameters)


def test_a_cache_that_was_cut_outside_goes_back_with_its_tangents():
    model = tiny_model("llama", trained=True).double()
    linlora.linearize(model, scope="model")
    randomize(model, 5, ("lora_dA", "lora_dB"))
    tokens = tiny_batch("llama")["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([2, 0]))
        actual = model(input_ids=tokens[[2, 0], 5:], past_key_values=cache).logits
        torch.testing.assert_close(actual, model(input_ids=tokens[[2, 0]]).logits[:, 5:])


def test_after_an_interrupt_the_network_is_left():
    def interrupt(module, args, output):
        raise KeyboardInterrupt

    model = linearized_model(Box)
    handle = model.get_base_model().norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    kept = model(X).content
    assert isinstance(kept, DualTensor)
    torch.testing.assert_close(kept.detach(), oracle(model)[0].detach())


class Renamed(nn.Module):
    """A network whose methods have another name for self."""

    def __init__(this):
        super().__init__()
        this.first, this.second = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(this, x):
        return this.second(torch.utils.checkpoint.checkpoint(lambda y: this.first(y).tanh(), x, use_reentrant=False))


def features(network, x):
    """A function of its user, not a method."""
    return network.forward(x).tanh()


def test_a_method_is_known_by_its_class_and_its_module_not_by_the_name_of_self():
    torch.manual_seed(0)
    model = get_peft_model(Renamed(), LoraConfig(r=2, target_modules=["first", "second"])).double().eval()
    linlora.linearize(model, scope="model")
    randomize(model, 2, scale=0.3), randomize(model, 3, ("lora_dA", "lora_dB"), 0.3)
    parameters, base = [p for p in model.parameters() if p.requires_grad], model.get_base_model()
    expected = model(X)
    gradients = torch.autograd.grad(expected.tanh().sum(), parameters)
    y = base.forward(X)
    torch.testing.assert_close(y.detach(), expected.detach())
    torch.testing.assert_close(torch.autograd.grad(y.tanh().sum(), parameters), gradients)
    torch.testing.assert_close(features(base, X), expected.tanh())
    base.forward = types.MethodType(lambda network, x: network.second(network.first(x).tanh()), base)
    torch.testing.assert_close(base.forward(X).detach(), expected.detach())


def test_two_networks_are_outside_of_one_another():
    """A student that calls its teacher, also past the hooks, after calls of both that were ended by hooks."""
    teacher, student = linearized_model(), linearized_model()
    randomize(teacher, 7, ("lora_dA", "lora_dB"), 0.3)
    F, G = oracle(teacher)[0].detach(), oracle(student)[0].detach()
    for _ in range(3):
        teacher(X), student(X)
        for call in CALLS.values():
            torch.testing.assert_close((call(student) - call(teacher)).square().mean(), (G - F).square().mean())
    for call in CALLS.values():
        student.get_base_model().result = lambda y, call=call: (y, y + call(teacher).detach())
        for y in student(X), student.get_base_model().forward(X):
            torch.testing.assert_close(y[1].detach(), G + F)
