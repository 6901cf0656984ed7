"""Mixed requests in one batch: task vectors as skills, and PEFT's adapter_names on converted layers."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from routed_models import rows_of

import linlora
from linlora import routing
from linlora.testing import randomize, tiny_batch, tiny_model

SCOPES = ["lora", "layer", "model"]


def model_with_vectors(scope, trained=True, architecture="bert"):
    """A model and three vectors of its point."""
    model = tiny_model(architecture, trained=trained).double()
    kinds = ("lora_A", "lora_B")
    start = None
    if scope == "lora":
        start = linlora.TaskVector.from_model(model)
    else:
        linlora.linearize(model, scope)
        kinds = ("lora_dA", "lora_dB") if trained else ("lora_B",)
    vectors = []
    for seed in range(3):
        randomize(model, seed, kinds)
        vectors.append(linlora.TaskVector.from_model(model, point=start))
    return model, vectors


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("trained", [True, False], ids=["pair", "short"])
@pytest.mark.parametrize("scope", SCOPES)
def test_every_row_runs_with_its_vector(scope, trained, architecture, double):
    model, vectors = model_with_vectors(scope, trained, architecture)
    batch, ids = tiny_batch(architecture, 5), torch.tensor([2, 0, 0, 1, 2])
    expected = []
    for row, task in enumerate(ids):
        linlora.apply(model, vectors[task])
        expected.append(model(**rows_of(batch, [row]))[0])
    routed = routing.from_vectors(model, vectors)
    torch.testing.assert_close(routed(**batch, task_ids=ids)[0], torch.cat(expected))
    assert not any(p.requires_grad for p in routed.parameters())


@pytest.mark.parametrize("scope", SCOPES)
def test_vectors_of_different_base_models_are_refused_whichever_come_first(scope):
    model, vectors = model_with_vectors(scope)
    named = [replace(vector, base_model=name) for vector, name in zip(vectors, (None, "one", "other"), strict=True)]
    with pytest.raises(linlora.DifferentPointError, match="different base models, 'one' and 'other'"):
        routing.from_vectors(model, named)


@pytest.mark.parametrize("trained", [True, False], ids=["pair", "short"])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_linearized_vectors_mix_exactly(scope, trained, batch, double):
    model, vectors = model_with_vectors(scope, trained)
    weights = torch.randn(5, 3, dtype=torch.float64)
    weights[3] = weights[1]  # rows that agree
    expected = []
    for row, (a, b, c) in enumerate(weights.tolist()):
        linlora.apply(model, a * vectors[0] + b * vectors[1] + c * vectors[2])
        expected.append(model(**rows_of(batch, [row])).logits)
    routed = routing.from_vectors(model, vectors)
    torch.testing.assert_close(routed(**batch, mixture=weights).logits, torch.cat(expected))
    one = routed(**batch, mixture=weights[:1].expand(5, -1)).logits  # all rows agree
    torch.testing.assert_close(one[0], torch.cat(expected)[0])


@pytest.mark.parametrize("hidden", [None, 0, 4])
def test_a_gate_weights_vectors_per_input_as_wemoe_writes_it(hidden, batch, double):
    """λ = b + V ReLU(U h + c), h the mean of the layer's input over its tokens; layer by layer, example by example."""
    model, vectors = model_with_vectors("layer")
    routed = routing.from_vectors(copy.deepcopy(model), vectors, variant="gate", hidden=hidden)
    start = routed(**batch).logits
    fixed = routed(**batch, mixture=torch.full((5, 3), 0.3, dtype=torch.float64)).logits
    torch.testing.assert_close(start, fixed)  # at first: task arithmetic with 0.3
    for parameter in routed.selectors.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer, gate = routed.layers[0], routed.layers[0].selector
    x = torch.randn(2, 6, layer.in_features, dtype=torch.float64)
    with routed.context.running(routing.batch.route_tasks(routed.routed_layers, None, 0, None)):
        y = layer(x)
    for row in range(2):
        h = x[row].mean(0)
        weights = gate.start.clone()
        if hidden == 0:
            weights = weights + gate.network.weight @ h
        elif hidden:
            first, _, last = gate.network
            weights = weights + last.weight @ torch.clamp(first.weight @ h + first.bias, min=0.0)
        deltas = [(v.deltas[f"{layer.layer_name}.dA"], v.deltas[f"{layer.layer_name}.dB"]) for v in vectors]
        dA, dB = (sum(w * delta[i] for w, delta in zip(weights, deltas, strict=True)) for i in range(2))
        A0, B0 = layer.A0, layer.B0
        W = layer.weight + layer.sizes.scaling * ((B0 + dB) @ A0 + B0 @ dA)
        torch.testing.assert_close(y[row], torch.nn.functional.linear(x[row], W, layer.bias))
    routed(**batch).logits.sum().backward()
    trained = {n.split(".")[0] for n, p in routed.named_parameters() if p.requires_grad}
    assert trained == {"selectors"}
    assert all(p.grad is not None for p in routed.parameters() if p.requires_grad)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("part", ["query", "query.lora_A.default", "query.lora_dropout.default"])
def test_hooks_on_what_is_taken_off_are_refused_by_name(scope, part):
    model, vectors = model_with_vectors(scope)
    parts = {name: module for name, module in model.named_modules() if name.endswith(part)}
    if not parts:  # linearized layers may keep a part elsewhere, or not at all
        parts = {
            name: module for name, module in model.named_modules() if "lora_A" in name and name.endswith("default")
        }
    name, module = next(iter(parts.items()))
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"from_vectors: '{name.removeprefix('base_model.model.')}' has hooks"):
        routing.from_vectors(model, vectors)


def test_hooks_that_stay_run(double):
    model, vectors = model_with_vectors("layer")
    seen = []
    query = next(module for name, module in model.named_modules() if name.endswith("query"))
    query.get_base_layer().register_forward_hook(lambda *_: seen.append("layer"))
    model.get_base_model().register_forward_hook(lambda *_: seen.append("model"))
    with pytest.warns(UserWarning, match="hooks"):
        routing.from_vectors(model, vectors)(**tiny_batch("bert", 2), task_ids=[0, 1])
    assert seen == ["layer", "model"]


def test_vectors_that_do_not_go_together():
    model, vectors = model_with_vectors("layer")
    _, foreign = model_with_vectors("layer", trained=False)
    with pytest.raises(linlora.DifferentPointError):
        routing.from_vectors(model, [vectors[0], foreign[0]])
    with pytest.raises(ValueError, match="no vectors"):
        routing.from_vectors(model, [])
    with pytest.raises(ValueError, match="unknown variant 'best'"):
        routing.from_vectors(model, vectors, variant="best")
    with pytest.raises(TypeError, match="takes the PeftModel"):
        routing.from_vectors(torch.nn.Linear(2, 2), vectors)
    for scope in ("layer", "lora"):  # PEFT unloads a merged layer as it is
        model, vectors = model_with_vectors(scope)
        model.merge_adapter()
        with pytest.raises(ValueError, match="are merged"):
            routing.from_vectors(model, vectors)


# -- plain adapters trained apart -------------------------------------------------------------------------------------

STRANGERS = (
    {"r": 4, "target_modules": ["query"]},
    {"r": 2, "lora_alpha": 3, "target_modules": ["query", "value"]},
    {"r": 5, "use_rslora": True, "target_modules": ["value"]},
)


def strangers(folder):
    """Adapters of other ranks, scalings and layers, as vectors in weight space, and a model for them."""
    vectors = []
    for seed, options in enumerate(STRANGERS):
        model = tiny_model("bert", trained=True, seed=seed, **options)
        model.save_pretrained(folder / str(seed))
        vectors.append(linlora.formats.read(folder / str(seed)))
    vectors[2] = 0.5 * vectors[2]
    return tiny_model("bert").double(), vectors


def merged(model, vectors, weights):
    """The base model with Σ w ΔW in its weights."""
    base = copy.deepcopy(model).unload()
    for vector, weight in zip(vectors, weights, strict=True):
        for name in vector.scalings:
            update = vector.update(name)
            base.get_submodule(name).weight.data += weight * (update.B.double() @ update.A.double())
    return base


def test_every_row_is_the_model_with_its_mixture_of_strangers_merged(tmp_path, batch, double):
    model, vectors = strangers(tmp_path)
    weights = torch.randn(5, 3, dtype=torch.float64)
    weights[0], weights[1], weights[4] = torch.tensor([0.0, 1.0, 0.0]), 0.0, weights[2]
    expected = torch.cat([merged(model, vectors, w)(**rows_of(batch, [i])).logits for i, w in enumerate(weights)])
    routed = routing.from_vectors(model, vectors)
    torch.testing.assert_close(routed(**batch, mixture=weights).logits, expected, rtol=1e-10, atol=1e-12)
    one = routed(**batch, mixture=weights[3].expand(5, -1)).logits  # all rows agree
    torch.testing.assert_close(one[3], expected[3], rtol=1e-10, atol=1e-12)
    ids = routed(**batch, task_ids=[1] * 5).logits
    torch.testing.assert_close(ids[0], expected[0], rtol=1e-10, atol=1e-12)
    tokens = weights[:, None, None].expand(-1, batch["input_ids"].shape[1], -1, -1)  # a mixture for every token
    torch.testing.assert_close(routed(**batch, mixture=tokens).logits, expected, rtol=1e-10, atol=1e-12)
    weights[2, 1] = torch.inf
    with pytest.raises(ValueError, match="the weights of example 2 are not finite"):
        routed(**batch, mixture=weights)


def test_the_weights_of_strangers_train_and_one_of_weight_zero_has_no_part(tmp_path, batch, double):
    model, vectors = strangers(tmp_path)
    routed = routing.from_vectors(model, vectors)
    weights = torch.randn(5, 3, dtype=torch.float64).index_fill(0, torch.tensor([0]), 0.0)
    function = lambda w: routed(**batch, mixture=w).logits  # noqa: E731
    assert torch.autograd.gradcheck(function, weights.requires_grad_(), eps=1e-5, atol=1e-6, fast_mode=True)
    weights = weights.detach()
    weights[:, 1] = 0.0
    expected = function(weights)
    for layer in routed.routed_layers:
        layer.lora_B.data[:, 1] = torch.nan
    assert torch.equal(function(weights), expected)


# -- PEFT's adapter_names ---------------------------------------------------------------------------------------------


def model_with_adapters(architecture, linearize):
    """Adapters of ranks 4 and 3, of which the second is on fewer layers."""
    model = tiny_model(architecture, trained=True)
    targets = sorted(model.peft_config["default"].target_modules)[:1]
    options = {"fan_in_fan_out": architecture == "gpt2"}
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=targets, **options))
    randomize(model, 3)
    if linearize:
        linlora.linearize(model)
        randomize(model, 4, ("lora_dA", "lora_dB"))
    else:
        linlora.accelerate(model)
    return model


@pytest.mark.parametrize("linearize", [False, True], ids=["plain", "linearized"])
@pytest.mark.parametrize("architecture", ["bert", "t5", "gpt2"])
def test_every_row_has_the_adapter_it_names(architecture, linearize):
    model, batch = model_with_adapters(architecture, linearize), tiny_batch(architecture, 6)
    names = ["second", "__base__", "default", "second", "default", "__base__"]
    y = model(**batch, adapter_names=names)[0]
    for row, name in enumerate(names):
        alone = rows_of(batch, [row])
        if name == "__base__":
            with model.disable_adapter():
                expected = model(**alone)[0]
        else:
            model.set_adapter(name)
            expected = model(**alone)[0]
        torch.testing.assert_close(y[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    for name in ("second", "default"):  # rows that agree
        model.set_adapter(name)
        together = model(**batch, adapter_names=[name] * 6)[0]
        torch.testing.assert_close(together, model(**batch)[0])


def test_stock_peft_computes_the_same():
    model, batch = model_with_adapters("bert", linearize=False), tiny_batch("bert", 4)
    names = ["default", "second", "second", "__base__"]
    factors = {n: p.requires_grad_(True) for n, p in model.named_parameters() if "lora_" in n}
    y = model(**batch, adapter_names=names).logits
    gradients = torch.autograd.grad(y.sin().sum(), factors.values())
    stock = linlora.delinearize(model)
    expected = stock(**batch, adapter_names=names).logits
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for name, gradient, of_stock in zip(
        factors, gradients, torch.autograd.grad(expected.sin().sum(), factors.values()), strict=True
    ):
        torch.testing.assert_close(gradient, of_stock, rtol=1e-3, atol=1e-5, msg=name)


def test_beams_keep_the_adapter_of_their_row():
    model = model_with_adapters("t5", linearize=True)
    inputs, names = {"input_ids": tiny_batch("t5", 3)["input_ids"]}, ["second", "default", "second"]
    together = model.generate(**inputs, adapter_names=names, num_beams=3, max_new_tokens=4)
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model.generate(**rows_of(inputs, [row]), num_beams=3, max_new_tokens=4)
        assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)
