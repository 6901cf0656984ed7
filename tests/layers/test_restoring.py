"""Functions that change a model in place finish, or leave it as it was, whichever of their steps fails."""

import contextlib
import signal
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import linlora
from linlora.layers import adapters, conversion, layer_merging, linearize, model_scope, report, weights
from linlora.layers.lora_linear import ConvertedLoraLinear
from linlora.stream import head
from linlora.testing import randomize, tiny_base, tiny_batch, tiny_model
from linlora.vectors import task_vector


class FailedStepError(RuntimeError):
    pass


def state(model):
    """Everything of a model that a function could leave changed, as values that compare."""
    return {
        name: (
            module,
            type(module),
            module.training,
            {key: value for key, value in vars(module).items() if not callable(value)},
            {key: list(hooks.items()) for key, hooks in vars(module).items() if isinstance(hooks, OrderedDict)},
            {key: value for key, value in vars(module).items() if callable(value)}.keys(),
            [(key, id(p), p.requires_grad, p.tolist()) for key, p in module._parameters.items() if p is not None],
            {key: dict(value) for key, value in vars(module).items() if type(value) is dict and key[0] != "_"},
        )
        for name, module in model.named_modules()
    }


def model(linearized=None, modules_to_save=("classifier",), dtype=None):
    made = tiny_model("llama" if modules_to_save is None else "bert", trained=True, modules_to_save=modules_to_save)
    if dtype is not None:
        made.get_base_model().to(dtype)
    if linearized is not None:
        linlora.linearize(made, scope=linearized)
        randomize(made, 5, ("lora_dA", "lora_dB"), scale=0.02)
    return made


def vector():
    made = model("layer")
    return 2.0 * linlora.TaskVector.from_model(made)


def point():
    made = tiny_model("bert", trained=True, seed=3, modules_to_save=["classifier"])
    linlora.linearize(made)
    return linlora.TaskVector.from_model(made)


STEPS = {
    "linearize": (
        None,
        lambda made: linlora.linearize(made, point=point()),
        [
            (linearize, "convert_layer"), (linearize, "_linearize_adapter"), (linearize, "guard_saving"),
            (linearize, "accept_rows"), (linearize, "guard_merging"), (linearize, "report"),
            (task_vector, "assign"), (conversion, "follow_class"),
        ],
    ),
    "linearize at model scope": (
        None,
        lambda made: linlora.linearize(made, scope="model"),
        [
            (linearize, "enter_model_scope"), (head, "attach"), (model_scope, "convert_modules"), (report, "_backend"),
        ],
    ),
    "accelerate": (None, linlora.accelerate, [(linearize, "convert_layer"), (linearize, "report")]),
    "set_scope to model": (
        "layer", lambda made: linlora.set_scope(made, "model"), [(head, "attach"), (model_scope, "convert_modules")]
    ),
    "set_scope to layer": (
        "model", lambda made: linlora.set_scope(made, "layer"), [(head, "detach"), (model_scope, "restore_modules")]
    ),
    "delinearize": (
        "model",
        linlora.delinearize,
        [
            (linearize, "leave_model_scope"), (linearize, "_delinearize_layer"), (linearize, "convert_back"),
            (linearize, "unguard_saving"), (linearize, "refuse_rows"), (linearize, "unguard_merging"),
        ],
    ),
    "apply": ("layer", lambda made: linlora.apply(made, vector()), [(task_vector, "assign")]),
    "merge": (
        None,
        linlora.merge,
        [
            (ConvertedLoraLinear, "update_that_fits"), (linearize, "convert_layer"),
            (ConvertedLoraLinear, "unload_and_optionally_merge_module"),
        ],
    ),
    "merge of a linearized model": (
        "layer", linlora.merge, [(ConvertedLoraLinear, "unload_and_optionally_merge_module")]
    ),
    "add_adapter": (
        "layer",
        lambda made: made.add_adapter("later", LoraConfig(r=2, target_modules=["query", "key"])),
        [(ConvertedLoraLinear, "update_layer"), (adapters, "not_vanilla_layer")],
    ),
}  # fmt: skip
CASES = [(name, *step) for name, (_, _, steps) in STEPS.items() for step in steps]


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(("name", "owner", "step"), CASES, ids=[f"{name}-{step}" for name, _, step in CASES])
def test_a_step_that_fails_leaves_the_model_as_it_was(name, owner, step, call, monkeypatch):
    scope, function, _ = STEPS[name]
    made = model(scope)
    before = state(made)
    work, calls = getattr(owner, step), []

    def failing(*args, **kwargs):
        calls.append(step)
        if len(calls) == call:
            raise FailedStepError
        return work(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, failing)
        with contextlib.suppress(FailedStepError):
            function(made)
    assert calls
    if len(calls) >= call:
        assert state(made) == before
        function(made)  # what failed can be done again


@pytest.mark.parametrize("make", [model, lambda: model("layer")], ids=["plain", "linearized"])
def test_merge_leaves_a_model_whose_sum_overflows_as_it_was(make):
    made = make()
    made.get_base_model().half()
    layer = [module for module in made.modules() if "lora_A" in vars(module).get("_modules", {})][3]
    layer.lora_B["default"].weight.data.fill_(6e4)
    before = state(made)
    with pytest.raises(ValueError, match=r"layer '.*': merging \['default'\] gives NaN or infinity.*float16"):
        linlora.merge(made)
    assert state(made) == before


@pytest.fixture
def hears_ctrl_c():
    """A shell may start its background jobs deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("merge", ["merge", "merge_adapter", "merge_and_unload"])
def test_an_interrupt_waits_until_all_weights_are_folded(merge, monkeypatch):
    expected = linlora.merge(model("layer"))(**tiny_batch("bert")).logits
    made = model("layer")
    owner, step = {
        "merge": (weights, "fold"),
        "merge_adapter": (layer_merging, "fold_keeping"),
        "merge_and_unload": (layer_merging, "fold"),
    }[merge]
    work = getattr(owner, step)

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return work(*args)

    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        linlora.merge(made) if merge == "merge" else getattr(made, merge)()
    torch.testing.assert_close(made(**tiny_batch("bert")).logits, expected)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("hears_ctrl_c")
def test_an_interrupt_waits_until_all_weights_are_unfolded(monkeypatch):
    made = model("layer")
    before = state(made)
    made.merge_adapter()
    work = layer_merging.unfold

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        work(*args)

    monkeypatch.setattr(layer_merging, "unfold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.unmerge_adapter()
    assert state(made) == before


@pytest.mark.parametrize("merge", [linlora.merge, lambda made: made.merge_and_unload()], ids=["linlora", "peft"])
@pytest.mark.parametrize("call", [1, 3])
def test_what_would_stop_a_fold_stops_it_before_the_first_weight_changes(merge, call, monkeypatch):
    made, calls, work = model("layer"), [], weights.folded
    before = state(made)

    def failing(*args):
        calls.append(1)
        if len(calls) == call:
            raise MemoryError
        return work(*args)

    monkeypatch.setattr(weights, "folded", failing)
    with pytest.raises(MemoryError):
        merge(made)
    assert state(made) == before


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_by_peft_that_fails_at_a_layer_leaves_the_model_as_it_was(merge):
    made = model("layer")
    layers = [module for module in made.modules() if isinstance(module, ConvertedLoraLinear)]
    layers[3].lora_B["default"].weight.data[0, 0] = 1e38
    layers[3].lora_A["default"].weight.data[0] = 1e38
    before = state(made)
    with pytest.raises(ValueError, match="gives NaN or infinity"):
        getattr(made, merge)()
    assert state(made) == before


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_by_peft_writes_no_infinities(merge):
    base = nn.Sequential(nn.Linear(4, 4)).half()
    made = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    linlora.linearize(made)
    made.base_model.model[0].lora_dB["default"].data.fill_(6e4)
    before = made.base_model.model[0].weight.clone()
    with pytest.raises(ValueError, match=r"layer '0': merging \['default'\] gives NaN or infinity"):
        getattr(made, merge)()
    assert torch.equal(made.base_model.model[0].weight, before)


def test_merge_refuses_a_weight_that_is_computed():
    made = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    linlora.linearize(made)
    nn.utils.parametrizations.weight_norm(made.base_model.model[0].base_layer)
    for merge in (linlora.merge, lambda m: m.merge_adapter()):
        with pytest.raises(ValueError, match="layer '0': the weight of its base layer is computed on every call"):
            merge(made)


def test_an_adapter_file_of_another_rank_changes_nothing(tmp_path):
    other = tiny_model("bert", trained=True, seed=4, rank_pattern={"layer.1.output.dense": 3})
    other.save_pretrained(tmp_path)
    made = tiny_model("bert", trained=True)
    linlora.accelerate(made)
    before = state(made)
    with pytest.raises(RuntimeError, match="size mismatch"):
        made.load_adapter(tmp_path, "default")
    assert state(made) == before


def test_a_refused_adapter_leaves_the_layers_before_it_alone():
    made = tiny_model("bert", target_modules=["value"])
    linlora.linearize(made)
    before = state(made)
    with pytest.raises(ValueError, match="adapter 'later' cannot be added to a converted layer"):
        made.add_adapter("later", LoraConfig(r=2, target_modules=["query", "value"], use_dora=True))
    assert state(made) == before
    assert "later" not in made.peft_config


@pytest.mark.parametrize("trained", [False, True], ids=["short", "pair"])
def test_a_name_that_is_taken_is_free_once_its_linearized_adapter_is_deleted(trained):
    made = tiny_model("bert", trained=trained)
    linlora.linearize(made)
    before = state(made)
    with pytest.raises(ValueError, match="adapter 'default' is linearized"):
        made.base_model.inject_adapter(made.base_model.model, "default")
    assert state(made) == before
    made.delete_adapter("default")
    made.add_adapter("default", LoraConfig(r=2, target_modules=["query", "value"]))
    made.set_adapter("default")
    fresh = tiny_base("bert")
    torch.testing.assert_close(made(**tiny_batch("bert")).logits, fresh(**tiny_batch("bert")).logits)
    linlora.delinearize(made)
