"""Calls that a fused layer replaces: whatever they would run still runs, or the layer says what cannot."""

import copy
import warnings

import pytest
import torch
import torch.utils.flop_counter
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import linlora
from linlora.testing import randomize

PARTS = ("base_layer", "lora_A", "lora_B", "lora_dropout")
SCOPES = ("plain", "layer", "model")
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double()


def mlp(**options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["0", "2"], **options}))
    randomize(model)
    return model.double()


def made(model, scope):
    linlora.accelerate(model) if scope == "plain" else linlora.linearize(model, scope=scope)
    return model


def part_of(model, kind):
    part = getattr(model.base_model.model[2], kind)
    return part if kind == "base_layer" else part["default"]


def hook(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)


def hook_with_kwargs(module):
    module.register_forward_hook(lambda module, args, kwargs, output: 2 * output, with_kwargs=True)


def hook_of_inputs(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def own_forward(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


CHANGES = (hook, hook_with_kwargs, hook_of_inputs, own_forward)
WEIGHTS = (
    parametrizations.weight_norm,
    weight_norm,
    lambda part: parametrizations.spectral_norm(part.eval()),
    lambda part: prune.l1_unstructured(part, "weight", 0.5),
)


def agrees_or_refuses(model, oracle, scope):
    """A fused model has PEFT's output and gradients; refusing is right where an adapter is linearized."""
    try:
        actual = model(X)
    except ValueError:
        with pytest.raises(ValueError, match=r"layer '2': .* which does not go with .* linlora.delinearize\(model\)"):
            model(X if scope != "plain" else None)
        return
    torch.testing.assert_close(actual, oracle(X))
    names = [name for name, parameter in oracle.named_parameters() if parameter.requires_grad]
    if not names:
        return
    expected = torch.autograd.grad(oracle(X).sin().sum(), [oracle.get_parameter(name) for name in names])
    if scope != "plain":
        names = [name.replace("lora_", "lora_d").replace(".weight", "") for name in names]
    gradients = torch.autograd.grad(actual.sin().sum(), [model.get_parameter(name) for name in names])
    torch.testing.assert_close(gradients, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_call_runs_or_is_refused_before_and_after_the_layer_is_made(change, kind, scope):
    oracle, later, model = mlp(), made(mlp(), scope), mlp()
    for each in (oracle, later, model):
        change(part_of(each, kind))
    agrees_or_refuses(later, oracle, scope)
    if scope != "plain" and kind != "base_layer":
        with pytest.raises(linlora.UnsupportedLayerError, match=rf"layer '2': {kind}\['default'\] has "):
            made(model, scope)
        assert type(model.base_model.model[0]).__name__ == "Linear"
    else:
        agrees_or_refuses(made(model, scope), oracle, scope)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize("change", WEIGHTS, ids=["parametrization", "weight_norm", "spectral_norm", "pruning"])
def test_a_computed_weight_is_computed_or_refused(change, kind, scope):
    oracle, model = mlp(), made(mlp(), scope)
    for each in (oracle, model):
        change(part_of(each, kind))
        each.requires_grad_(False)  # the parametrization has parameters of its own
    oracle.eval(), model.eval()
    agrees_or_refuses(model, oracle, scope)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["base_layer", "lora_B"])
def test_backward_hooks_run(kind):
    model, called = made(mlp(), "plain"), []
    part_of(model, kind).register_full_backward_hook(lambda *_: called.append(kind))
    model(X).sum().backward()
    assert called == [kind]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scope", SCOPES)
def test_hooks_of_all_modules_run_or_are_refused(scope):
    oracle, model = mlp(), made(mlp(), scope)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if type(module) is nn.Linear else None
    )
    try:
        expected = oracle(X)
        if scope == "plain":
            torch.testing.assert_close(model(X), expected)
        else:
            with pytest.raises(ValueError, match="layer '0': hooks of all modules are for lora_A and lora_B too"):
                model(X)
    finally:
        handle.remove()
    torch.testing.assert_close(model(X), oracle(X))


def test_counting_flops_is_not_in_the_way():
    model = made(mlp(), "layer")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(X)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("scope", SCOPES)
def test_a_dropout_of_another_kind_runs_or_is_refused(scope):
    oracle, later = mlp(), made(mlp(), scope)
    for each in (oracle, later):
        each.base_model.model[2].lora_dropout["default"] = nn.Hardtanh(-0.1, 0.1)
    if scope == "plain":
        with pytest.warns(UserWarning, match=r"lora_dropout\['default'\] is a Hardtanh, so PEFT's forward runs"):
            torch.testing.assert_close(later(X), oracle(X))
    else:
        with pytest.raises(ValueError, match=r"layer '2': lora_dropout\['default'\] is a Hardtanh"):
            later(X)


def test_dropout_follows_its_own_mode_as_in_peft():
    model, exact = made(mlp(lora_dropout=0.5), "layer").train(), mlp()(X)
    for layer in (model.base_model.model[0], model.base_model.model[2]):
        layer.lora_dropout.eval()
    torch.testing.assert_close(model(X), exact)
    model.eval()
    model.base_model.model[2].lora_dropout.train()
    assert not torch.equal(model(X), model(X))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_forward_of_peft_kept_from_before_is_refused(scope):
    model = mlp()
    layer = model.base_model.model[0]
    kept = layer.forward
    made(model, scope)
    with pytest.raises(ValueError, match="layer '0': PEFT's forward is called, which does not go with"):
        kept(X)


def test_a_forward_set_on_a_lora_layer_is_refused_by_its_name():
    for make in (linlora.accelerate, linlora.linearize):
        model = mlp()
        own_forward(model.base_model.model[2])
        with pytest.raises(linlora.UnsupportedLayerError, match="'2': its forward was replaced on the instance"):
            make(model)


@pytest.mark.parametrize("scope", SCOPES)
def test_models_dispatched_by_accelerate_stay_fused(scope):
    accelerate = pytest.importorskip("accelerate")
    oracle = mlp()
    model = accelerate.dispatch_model(mlp(), {"": "cpu"}, force_hooks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(model, scope)
        agrees_or_refuses(model, oracle, scope)
        twin = copy.deepcopy(model)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        agrees_or_refuses(model, oracle, scope)
        linlora.delinearize(twin)
        linlora.delinearize(model)
    for each in (twin, model):
        torch.testing.assert_close(each(X), oracle(X))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_offloaded_models_run_as_in_peft_or_are_refused():
    accelerate = pytest.importorskip("accelerate")
    oracle = mlp()
    model = accelerate.cpu_offload(mlp(), torch.device("cpu"))
    with pytest.raises(linlora.UnsupportedLayerError, match=r"layer '0': lora_A\['default'\] has .*remove_hook_from"):
        linlora.linearize(model)
    linlora.accelerate(model)
    torch.testing.assert_close(model(X), oracle(X))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scope", ["plain", "layer"])
def test_a_base_that_alone_is_offloaded_is_called(scope):
    accelerate = pytest.importorskip("accelerate")
    oracle, model = mlp(), mlp()
    for each in (0, 2):
        accelerate.cpu_offload(model.base_model.model[each].base_layer, torch.device("cpu"))
    agrees_or_refuses(made(model, scope), oracle, scope)
