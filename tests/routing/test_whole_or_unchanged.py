"""Functions that change a model in place finish, or leave it bit for bit as it was; what they replace still runs."""

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import linlora
from linlora import routing
from linlora.routing.dyadic import DyadicLoraLinear
from linlora.routing.model import RoutedModel
from linlora.routing.routed_lora_linear import RoutedLoraLinear
from linlora.routing.selectors import Poly
from linlora.testing import randomize, tiny_base, tiny_batch, tiny_model


class Broken(Exception):
    pass


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def everything(model):
    """What a model is made of: modules, classes, modes, hooks; parameters and buffers with their values."""
    modules = {
        name: (id(module), type(module), module.training, *(list(vars(module)[hooks]) for hooks in HOOKS))
        for name, module in model.named_modules(remove_duplicate=False)
    }
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return modules, {name: (id(t), t.requires_grad, t.dtype, t.detach().clone()) for name, t in tensors}


def same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, (*was, values) in before[1].items():
        *now, tensor = after[1][name]
        assert was == now, name
        assert torch.equal(values, tensor), name


def at_call(monkeypatch, owner, name, number):
    """The call of this number of a function raises; the others run."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            raise Broken
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def routed_model(state="trained"):
    routed = routing.route(tiny_base("bert"), 3, n_skills=3, n_heads=2, rank=2, target_modules=["query", "value"])
    for parameter in routed.skills():
        nn.init.normal_(parameter, std=0.1)
    if state != "trained":
        routed.linearize(state)
    return routed


def poly_model():
    config = peft.PolyConfig(n_tasks=3, n_skills=2, n_splits=2, r=2, target_modules=["query", "value"])
    model = get_peft_model(tiny_base("bert"), config)
    for name, parameter in model.named_parameters():
        if "poly_lora" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def with_vectors(scope):
    model = tiny_model("bert", trained=True)
    linlora.linearize(model, scope)
    randomize(model, 0, ("lora_dA", "lora_dB"))
    return model, [linlora.TaskVector.from_model(model)] * 2


def _route(monkeypatch):
    model = tiny_base("bert")
    return model, lambda: routing.route(model, 3, target_modules=["query", "value"], modules_to_save=["classifier"])


def _mode(monkeypatch):
    model = tiny_base("bert")
    return model, lambda: routing.route(model, 3, variant="mode", rank=2, target_modules=["query", "value"])


def _convert(linearized):
    def prepare(monkeypatch):
        model = poly_model()
        return model, lambda: routing.convert(model, linearized)

    return prepare


def _from_vectors(scope):
    def prepare(monkeypatch):
        model, vectors = with_vectors(scope)
        return model, lambda: routing.from_vectors(model, vectors)

    return prepare


def _of(state, function):
    def prepare(monkeypatch):
        model = routed_model(state)
        return model, lambda: function(model)

    return prepare


CASES = {
    "route, second layer": (_route, RoutedLoraLinear, "__init__", 2),
    "route, second layer put in": (_route, RoutedLoraLinear, "train", 2),
    "route, hooks": (_route, RoutedModel, "register_state_dict_post_hook", 1),
    "route mode": (_mode, DyadicLoraLinear, "__init__", 2),
    "convert, unload": (_convert(False), RoutedModel, "__init__", 1),
    "convert, layers": (_convert(False), RoutedLoraLinear, "__init__", 3),
    "convert, linearize": (_convert(True), RoutedLoraLinear, "linearize", 3),
    "from_vectors, model": (_from_vectors("layer"), RoutedModel, "__init__", 1),
    "from_vectors, layers": (_from_vectors("model"), RoutedLoraLinear, "allocate_point", 2),
    "from_vectors, scope": (_from_vectors("model"), RoutedModel, "set_scope", 1),
    "linearize, layers": (_of("trained", linlora.linearize), RoutedLoraLinear, "linearize", 3),
    "linearize, scope": (
        _of("trained", lambda model: linlora.linearize(model, "model")), linlora.routing.scope, "enter_model_scope", 1,
    ),
    "set_scope": (
        _of("layer", lambda model: linlora.set_scope(model, "model")), linlora.layers.model_scope, "convert_modules", 1,
    ),
    "set_scope, back": (
        _of("model", lambda model: linlora.set_scope(model, "layer")), linlora.layers.model_scope, "restore_modules", 1,
    ),
    "delinearize": (_of("layer", linlora.delinearize), RoutedLoraLinear, "delinearize", 3),
    "merge_task": (_of("trained", lambda model: routing.merge_task(model, 1)), RoutedModel, "unload", 1),
    "collapse": (
        _of("trained", lambda model: routing.collapse(model, 1)), linlora.routing.adapters, "get_peft_model", 1,
    ),
    "collapse, linearize": (
        _of("layer", lambda model: routing.collapse(model, 1)), linlora.routing.adapters, "linearize", 1,
    ),
    "mhr_z": (_of("trained", routing.mhr_z), Poly, "add_tasks", 2),
    "mhr_mu": (_of("trained", routing.mhr_mu), RoutedLoraLinear, "set_selector", 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_function_that_fails_leaves_the_model_as_it_was(monkeypatch, case):
    prepare, owner, name, number = CASES[case]
    model, call = prepare(monkeypatch)
    before = everything(model)
    at_call(monkeypatch, owner, name, number)
    with pytest.raises(Broken):
        call()
    same(before, everything(model))
    monkeypatch.undo()
    call()  # and it can be tried again


def test_a_skill_that_is_not_finite_is_not_averaged_into_the_others():
    routed = routed_model()
    with torch.no_grad():
        routed.layers[1].lora_B[0, 1, 0, 0] = torch.inf
    before = everything(routed)
    with pytest.raises(ValueError, match=rf"layer '{routed.layers[1].layer_name}': a skill holds NaN or infinity"):
        linlora.linearize(routed)
    same(before, everything(routed))


def adapters(tmp_path, *options):
    """Plain PEFT adapters of one base in folders, and the logits of the base with each."""
    folders, logits = [], []
    for seed, option in enumerate(options):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_base("llama"), LoraConfig(init_lora_weights=False, **option)).eval()
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
        logits.append(model(**tiny_batch("llama", 1)).logits.detach())
    return folders, logits


def test_plain_adapters_of_any_rank_scaling_and_layers_are_served_exactly(tmp_path):
    folders, expected = adapters(
        tmp_path,
        {"r": 4, "target_modules": ["q_proj"]},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
        {"r": 5, "use_rslora": True, "target_modules": ["v_proj"]},
    )
    model = PeftModel.from_pretrained(tiny_base("llama"), folders[0]).eval()
    vectors = [linlora.formats.read(folder) for folder in folders]
    routed = routing.from_vectors(model, vectors).eval()
    batch = {name: tensor.repeat(4, *(1,) * (tensor.dim() - 1)) for name, tensor in tiny_batch("llama", 1).items()}
    ids = torch.tensor([2, 0, 1, 2])
    logits = routed(**batch, task_ids=ids).logits
    torch.testing.assert_close(logits, torch.cat([expected[i] for i in ids]), rtol=1e-4, atol=1e-5)
    one_hot = torch.eye(3)[ids]
    torch.testing.assert_close(routed(**batch, mixture=one_hot).logits, logits, rtol=1e-4, atol=1e-5)
    routed.save_pretrained(tmp_path / "routed")
    again = RoutedModel.from_pretrained(tiny_base("llama"), tmp_path / "routed").eval()
    for refusing in (routed, again):
        with pytest.raises(ValueError, match="adapters trained apart, whose factors have no mean to linearize"):
            linlora.linearize(refusing)
        with pytest.raises(ValueError, match="adapters trained apart, whose factors a Uniform would add"):
            refusing.set_selectors({n: routing.Uniform(s.sizes) for n, s in refusing.selector_by_name.items()})
        for mean in (routing.merge_task, routing.collapse):
            with pytest.raises(ValueError, match="trained apart, which have no mean"):
                mean(refusing, None)


def test_plain_adapters_that_no_selector_can_weight_are_refused_before_anything_is_done(tmp_path):
    folders, _ = adapters(tmp_path, {"r": 4, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["o_proj"]})
    model = PeftModel.from_pretrained(tiny_base("llama"), folders[0])
    vectors = [linlora.formats.read(folder) for folder in folders]
    before = everything(model)
    for variant in ("gate", "table", "poly", "uniform"):
        with pytest.raises(ValueError, match="trained apart do not add"):
            routing.from_vectors(model, vectors, variant)
    foreign = linlora.TaskVector.from_model(tiny_model("bert", trained=True))
    with pytest.raises(ValueError, match="does not have"):
        routing.from_vectors(model, [foreign])
    same(before, everything(model))


# -- what the routed layer replaces ------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x):
        return 2.0 * super().forward(x)


@pytest.mark.filterwarnings("ignore:layer")
@pytest.mark.parametrize("linearized", [False, True])
def test_convert_runs_the_forward_of_a_subclass(linearized):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(Doubled(8, 8), nn.Tanh(), nn.Linear(8, 4))

    config = peft.PolyConfig(n_tasks=2, n_skills=2, n_splits=2, r=2, target_modules=["0", "2"])
    model = get_peft_model(network(), config).eval()
    for name, parameter in model.named_parameters():
        if "poly" in name:
            nn.init.normal_(parameter, std=0.3)
    x, ids = torch.randn(5, 3, 8), torch.tensor([0, 1, 1, 0, 1])
    expected = model.base_model(x, task_ids=ids)
    routed = routing.convert(model).eval()
    torch.testing.assert_close(routed(x, task_ids=ids), expected)
    if linearized:
        mean = torch.full((5, 2), 0.5)
        wanted = routed(x, mixture=mean)
        for scope in ("layer", "model"):
            linlora.linearize(routed, scope) if scope == "layer" else linlora.set_scope(routed, scope)
            torch.testing.assert_close(routed(x, mixture=mean), wanted)
        linlora.set_scope(routed, "layer")
    with pytest.raises(ValueError, match=r"layer '0': its base layer is a Doubled"):
        routing.merge_task(routed, 1)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward", "global hook"])
@pytest.mark.parametrize("variant", ["poly", "mode"])
def test_what_a_call_of_the_base_layer_runs_still_runs(kind, variant):
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    routed = routing.route(base, 2, variant=variant, n_skills=2, rank=2, target_modules=["0"])
    for parameter in routed.skills():
        nn.init.normal_(parameter, std=0.3)
    layer, x, ids = routed.layers[0], torch.randn(3, 8), torch.tensor([0, 1, 0])
    with routed.context.running(routed._routing((x,), {}, ids, None)):
        plain = layer(x)
        frozen = layer.base_layer(x)
        handle = None
        if kind == "hook":
            layer.base_layer.register_forward_hook(lambda module, args, y: 3.0 * y)
        elif kind == "pre-hook":
            layer.base_layer.register_forward_pre_hook(lambda module, args: (0.0 * args[0],))
        elif kind == "forward":
            original = layer.base_layer.forward
            layer.base_layer.forward = lambda x: 3.0 * original(x)
        else:
            seen = []
            handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
        with pytest.warns(UserWarning, match=r"layer '0': its base layer .*called"):
            y = layer(x)
        if handle is not None:
            handle.remove()
            assert layer.base_layer in seen
    after = {"hook": 3.0 * frozen, "forward": 3.0 * frozen, "global hook": frozen}
    expected = plain - frozen + after.get(kind, layer.base_layer.bias.expand(3, -1))
    torch.testing.assert_close(y, expected)


def test_hooks_of_a_poly_layer_are_refused_by_its_name():
    model = poly_model()
    name, layer = next((n, m) for n, m in model.named_modules() if type(m).__module__.startswith("peft.tuners.poly.l"))
    layer.register_forward_hook(lambda *_: None)
    before = everything(model)
    with pytest.raises(ValueError, match=rf"layer '{name.removeprefix('base_model.model.')}' has hooks"):
        routing.convert(model)
    same(before, everything(model))


@pytest.mark.parametrize("module", [nn.Embedding(4, 4), nn.Bilinear(2, 2, 2)], ids=lambda m: type(m).__name__)
def test_layers_whose_weight_is_no_matrix_are_refused(module):
    with pytest.raises(ValueError, match=rf"layer 'x' is a {type(module).__name__}, whose weight is no plain matrix"):
        routing.routed_layer.check_linear("x", module)
