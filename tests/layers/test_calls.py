"""Calls that a converted layer replaces: whatever they would run still runs, or the layer says what cannot."""

import copy
import warnings

import pytest
import torch
import torch.utils.flop_counter
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
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


def agrees(model, oracle, scope):
    """A fused model has PEFT's output and gradients (A and B have not moved from where they were linearized)."""
    actual = model(X)
    torch.testing.assert_close(actual, oracle(X))
    names = [name for name, parameter in oracle.named_parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(oracle(X).sin().sum(), [oracle.get_parameter(name) for name in names])
    if scope != "plain":
        names = [name.replace("lora_", "lora_d").replace(".weight", "") for name in names]
    gradients = torch.autograd.grad(actual.sin().sum(), [model.get_parameter(name) for name in names])
    torch.testing.assert_close(gradients, expected)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(model(X), actual.detach())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_call_runs_before_and_after_the_layer_is_made(change, kind, scope):
    oracle, later, model = mlp(), made(mlp(), scope), mlp()
    for each in (oracle, later, model):
        change(part_of(each, kind))
    agrees(later, oracle, scope)
    agrees(made(model, scope), oracle, scope)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("trained", [True, False])
def test_hooked_parts_that_change_nothing_leave_the_function(scope, trained):
    fused = mlp(init_lora_weights=True)
    if not trained:
        randomize(fused, kinds=("lora_B",), scale=0.0)
    linlora.linearize(fused, scope=scope)
    randomize(fused, 3, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    called, seen = copy.deepcopy(fused), []
    for kind in PARTS:
        part_of(called, kind).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(called(X), fused(X))
    assert len(seen) == len(PARTS)  # every call once
    parameters = [[p for p in each.parameters() if p.requires_grad] for each in (called, fused)]
    gradients = [torch.autograd.grad(m(X).sin().sum(), p) for m, p in zip((called, fused), parameters, strict=True)]
    torch.testing.assert_close(*gradients)
    if scope == "layer":
        called.eval(), fused.eval()
        names = ["default", "__base__", "default", "default", "__base__"]
        torch.testing.assert_close(called(X, adapter_names=names), fused(X, adapter_names=names))


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
    if scope != "plain" and kind != "base_layer":
        with pytest.raises(
            ValueError, match=rf"layer '2': the weight of {kind}\['default'\].* is computed on every call"
        ):
            model(X)
        fresh = mlp()
        change(part_of(fresh, kind))
        with pytest.raises(linlora.UnsupportedLayerError, match=rf"layer '2': the weight of {kind}\['default'\]"):
            linlora.linearize(fresh, scope=scope)
    else:
        torch.testing.assert_close(model(X), oracle(X))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["base_layer", "lora_B"])
def test_backward_hooks_run(kind):
    model, called = made(mlp(), "plain"), []
    part_of(model, kind).register_full_backward_hook(lambda *_: called.append(kind))
    model(X).sum().backward()
    assert called == [kind]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scope", SCOPES)
def test_hooks_of_all_modules_run(scope):
    oracle, model = mlp(), made(mlp(), scope)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if type(module) is nn.Linear else None
    )
    try:
        agrees(model, oracle, scope)
    finally:
        handle.remove()
    torch.testing.assert_close(model(X), oracle(X))


def test_counting_flops_is_not_in_the_way():
    model = made(mlp(), "layer")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(X)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("scope", SCOPES)
def test_a_dropout_of_another_kind_runs(scope):
    oracle, later = mlp(), made(mlp(), scope)
    for each in (oracle, later):
        each.base_model.model[2].lora_dropout["default"] = nn.Hardtanh(-0.1, 0.1)
    with pytest.warns(
        UserWarning, match=r"layer '2': lora_dropout\['default'\] is a Hardtanh, so all of them are called"
    ):
        torch.testing.assert_close(later(X), oracle(X))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_dropout_of_everything_leaves_the_base(scope):
    model = made(mlp(lora_dropout=1.0), scope).train()
    with model.disable_adapter():
        expected = model(X)
    with pytest.warns(UserWarning, match="layer '0': the dropout of its parts is 1, so all of them are called"):
        torch.testing.assert_close(model(X), expected)


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
    with pytest.raises(ValueError, match="layer '0': PEFT's own forward is called, which does not know"):
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
        agrees(model, oracle, scope)
        twin = copy.deepcopy(model)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        agrees(model, oracle, scope)
        linlora.delinearize(twin)
        linlora.delinearize(model)
    for each in (twin, model):
        torch.testing.assert_close(each(X), oracle(X))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_offloaded_models_run_as_in_peft_or_are_refused():
    accelerate = pytest.importorskip("accelerate")
    oracle = mlp()
    model = accelerate.cpu_offload(mlp(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the weight of lora_A\['default'\] is on the meta device.*remove_hook"):
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
    agrees(made(model, scope), oracle, scope)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_forward_of_pefts_class_runs_or_is_refused(when, monkeypatch):
    own = PeftLoraLinear.forward
    plain, linearized, stock = mlp(), mlp(), mlp()
    if when == "after":
        made(plain, "plain")
        made(linearized, "layer")
    monkeypatch.setattr(PeftLoraLinear, "forward", lambda self, x, *args, **kwargs: 2 * own(self, x, *args, **kwargs))
    if when == "before":
        made(plain, "plain")
    with pytest.warns(UserWarning, match="the forward of PEFT's LoRA layer was replaced"):
        torch.testing.assert_close(plain(X), stock(X))
    with pytest.raises((TypeError, ValueError), match="the forward of PEFT's LoRA layer was replaced"):
        made(linearized, "layer") if when == "before" else linearized(X)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_base_layer_put_in_the_place_of_another_is_called(scope):
    stock, fused = mlp(), made(mlp(), scope)
    for model in (stock, fused):
        layer = model.base_model.model[2]
        layer.base_layer = nn.Sequential(layer.base_layer, nn.Tanh())
    with pytest.warns(UserWarning, match="its base layer is a Sequential, so it is called"):
        torch.testing.assert_close(fused(X), stock(X))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("scope", SCOPES)
def test_traced_by_jit_or_refused(scope):
    model = made(mlp(), scope)
    if scope == "model":
        with pytest.raises(ValueError, match=r"torch\.jit\.trace does not see the tangent"):
            torch.jit.trace(model, (X,))
    else:
        torch.testing.assert_close(torch.jit.trace(model, (X[:2],))(X), model(X))
