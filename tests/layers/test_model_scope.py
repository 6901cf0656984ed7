"""Model scope: the network linearized as a whole, against torch.func over the whole network in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import linlora
from linlora.stream import DualTensor, TangentError
from linlora.testing import ARCHITECTURES, randomize, tiny_base, tiny_batch, tiny_model

CLASSIFIERS = ("bert", "roberta", "vit")


def linearized(architecture="bert", trained=True, scope="model", **lora_options):
    """A linearized model, displaced from its point."""
    model = tiny_model(architecture, trained, **lora_options)
    linlora.linearize(model, scope=scope)
    randomize(model, 5, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    return model


def batch_of(architecture, **options):
    batch = tiny_batch(architecture, **options)
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def delta_name(name, trained):
    return name.replace(".lora_", ".lora_d").replace(".weight", "") if trained else name


def functorch_gradients(model, oracle, batch, trained, loss):
    """(F, loss, gradient by parameter of the oracle) of f(φ0) + J δ by torch.func.jvp over the PEFT model `oracle`."""
    point = {name: p.detach() for name, p in oracle.named_parameters() if "lora_" in name}
    delta = {
        name: torch.zeros_like(p)
        if "lora_A" in name and not trained
        else model.get_parameter(delta_name(name, trained)).detach().clone()
        for name, p in point.items()
    }
    for tensor in delta.values():
        tensor.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        f, tangent = torch.func.jvp(lambda p: torch.func.functional_call(oracle, p, (), batch)[0], (point,), (delta,))
        value = loss(f + tangent)
        gradients = torch.autograd.grad(value, list(delta.values()))
    return (f + tangent).detach(), value.detach(), dict(zip(delta, gradients, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_loss_and_gradients_equal_torch_func(double, architecture, trained, attention):
    oracle = tiny_model(architecture, trained).double()
    model = linearized(architecture, trained).double()
    for m in (oracle, model):
        m.get_base_model().set_attn_implementation(attention)
    batch = batch_of(architecture)
    weights = torch.randn_like(model(**batch)[0])

    def loss(outputs):
        return (outputs.sin() * weights).sum()

    F, value, gradients = functorch_gradients(model, oracle, batch, trained, loss)
    output = model(**batch)[0]
    torch.testing.assert_close(output, F, rtol=1e-10, atol=1e-10)
    ours = loss(output)
    torch.testing.assert_close(ours, value, rtol=1e-10, atol=1e-10)
    ours.backward()
    for name, gradient in gradients.items():
        if not trained and "lora_A" in name:
            assert not gradient.any()  # at B0 = 0, dA has neither effect nor gradient
        else:
            actual = model.get_parameter(delta_name(name, trained)).grad
            torch.testing.assert_close(actual, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ["bert", "vit", "t5", "llama"])
def test_the_loss_is_that_of_the_linearized_logits_when_labels_are_given(double, architecture):
    oracle, model = tiny_model(architecture, True).double(), linearized(architecture).double()
    batch = batch_of(architecture)
    if architecture in CLASSIFIERS:
        labels = torch.tensor([0, 1, 2])
        loss = lambda logits: cross_entropy(logits, labels)  # noqa: E731
    elif architecture == "t5":
        labels = batch.pop("decoder_input_ids")
        batch["decoder_input_ids"] = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1)
        loss = lambda logits: cross_entropy(logits.flatten(0, 1), labels.flatten())  # noqa: E731
    else:
        labels = batch["input_ids"]
        loss = lambda logits: cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # noqa: E731
    _, expected, gradients = functorch_gradients(model, oracle, batch, True, loss)
    outputs = model(**batch, labels=labels)
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-10, atol=1e-10)
    outputs.loss.backward()
    for name, gradient in gradients.items():
        actual = model.get_parameter(delta_name(name, True)).grad
        torch.testing.assert_close(actual, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_are_affine_in_the_vector_at_model_scope_and_not_at_layer_scope(double, architecture, trained):
    deviation = {}
    for scope in ("layer", "model"):
        model = linearized(architecture, trained, scope).double()
        one = linlora.TaskVector.from_model(model)
        randomize(model, 6, ("lora_dA", "lora_dB") if trained else ("lora_B",), scale=0.3)
        other, batch = linlora.TaskVector.from_model(model), batch_of(architecture)

        def F(a, b, model=model, one=one, other=other, batch=batch):
            linlora.apply(model, a * one + b * other)
            with torch.no_grad():
                return model(**batch)[0]

        f = F(0, 0)
        affine = f + 0.7 * (F(1, 0) - f) - 1.3 * (F(0, 1) - f)
        deviation[scope] = float((F(0.7, -1.3) - affine).norm() / affine.norm())
    assert deviation["model"] < 1e-12
    assert deviation["layer"] > 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_function_of_these_models_lacks_a_rule(architecture):
    model = tiny_model(architecture, True)
    report = linlora.linearize(model, scope="model")
    model.train()
    model(**tiny_batch(architecture))
    assert report.fallbacks == ()
    assert "model scope" in str(report)
    assert ("modules run whole" in str(report)) == (architecture in ("t5", "flan_t5", "llama", "qwen2", "gpt2"))


def test_the_report_counts_functions_without_a_rule():
    model = tiny_model("bert", True)
    report = linlora.linearize(model, scope="model")
    dense = model.get_base_model().bert.encoder.layer[1].output.dense
    dense.register_forward_hook(lambda module, args, output: output + output.logsumexp(-1, keepdim=True))
    for _ in range(2):
        model(**tiny_batch("bert"))
    (fallback,) = report.fallbacks
    assert (fallback.function, fallback.calls) == ("logsumexp", 2)
    assert "without a rule, by forward mode: logsumexp in 'bert.encoder.layer.1.output.dense': 2 calls" in str(report)


def test_the_function_is_unchanged_at_the_point():
    model = tiny_model("bert", True)
    before = model(**tiny_batch("bert")).logits
    linlora.linearize(model, scope="model")
    torch.testing.assert_close(model(**tiny_batch("bert")).logits, before)


def test_inputs_stay_plain_until_the_first_adapter():
    model = linearized(target_modules=[f"encoder.layer.1.attention.self.{name}" for name in ("query", "value")])
    seen = {}

    def note(name, args):
        seen[name] = type(args[0]) if args else None

    for name, module in model.get_base_model().named_modules():
        if not name.endswith("base_layer"):
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
    model(**tiny_batch("bert"))
    assert seen["bert.encoder.layer.0.output.dense"] is torch.Tensor
    assert seen["bert.encoder.layer.1.attention.self.query"] is torch.Tensor
    assert issubclass(seen["bert.encoder.layer.1.output.dense"], DualTensor)


def test_every_output_of_the_model_is_a_plain_tensor():
    model = linearized()
    model.get_base_model().set_attn_implementation("eager")
    outputs = model(**tiny_batch("bert"), output_attentions=True, output_hidden_states=True, return_dict=True)
    for tensor in (outputs.logits, *outputs.attentions, *outputs.hidden_states):
        assert type(tensor) is torch.Tensor
    assert type(model(**tiny_batch("bert"), return_dict=False)[0]) is torch.Tensor


def test_a_head_that_is_trained_as_a_whole_sits_on_the_linearized_features(double):
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(tiny_base("bert"), config).eval()
    randomize(model, 3)
    model.double()
    report = linlora.linearize(model, scope="model")
    randomize(model, 4, ("lora_dA", "lora_dB"))
    assert "classifier (ModulesToSaveWrapper: trained as it is, on the linearized features" in str(report)
    batch = tiny_batch("bert")
    logits = model(**batch).logits
    logits.square().sum().backward()
    head = model.get_base_model().classifier.modules_to_save["default"]
    features = []
    handle = head.register_forward_pre_hook(lambda _, args: features.append(args[0].detach()))
    model(**batch)
    handle.remove()
    torch.testing.assert_close(logits, features[0] @ head.weight.t() + head.bias)
    torch.testing.assert_close(head.weight.grad, 2.0 * logits.detach().t() @ features[0])
    finite = []  # the gradient of one entry of dB by central differences
    dB = next(p for name, p in model.named_parameters() if "lora_dB" in name)
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            dB[3, 1] += step
            finite.append(model(**batch).logits.square().sum())
            dB[3, 1] -= step
    torch.testing.assert_close(dB.grad[3, 1], (finite[0] - finite[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_set_scope_keeps_point_and_vector():
    model = linearized(scope="layer")
    layer_logits, vector = model(**tiny_batch("bert")).logits, linlora.TaskVector.from_model(model)
    linlora.set_scope(model, "model")
    model_logits, cast = model(**tiny_batch("bert")).logits, linlora.TaskVector.from_model(model)
    assert cast.scope == "model"
    assert (vector.cast("model") - cast).norm() == 0
    assert not torch.allclose(layer_logits, model_logits, atol=1e-4)
    linlora.set_scope(model, "layer")
    torch.testing.assert_close(model(**tiny_batch("bert")).logits, layer_logits)


def test_vectors_of_different_scopes_do_not_mix():
    layer, model = linearized(scope="layer"), linearized()
    vector = linlora.TaskVector.from_model(layer)
    with pytest.raises(linlora.DifferentPointError, match="scope"):
        linlora.apply(model, vector)
    linlora.apply(model, vector.cast("model"))
    with pytest.raises(ValueError, match="choose 'layer', 'model' or 'weight'"):
        vector.cast("lora")


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
def test_post_hoc_linearization_of_a_trained_adapter(double, trained, scope):
    model = tiny_model("bert", trained).double()
    start, batch = linlora.TaskVector.from_model(model), tiny_batch("bert")
    twin = copy.deepcopy(model)
    values = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    randomize(model, 9, scale=0.3)  # plain training
    vector = linlora.TaskVector.from_model(model, point=start)
    linlora.linearize(twin, scope=scope)
    linlora.apply(twin, vector.cast(scope))
    if scope == "model":
        delta = {n: model.get_parameter(n).detach() - value for n, value in values.items()}
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            f, tangent = torch.func.jvp(
                lambda p: torch.func.functional_call(model, p, (), batch)[0], (values,), (delta,)
            )
        torch.testing.assert_close(twin(**batch).logits, f + tangent)
    assert not torch.allclose(twin(**batch).logits, model(**batch).logits)


def test_a_vector_is_saved_and_loaded_with_its_scope(tmp_path):
    model = linearized()
    vector = linlora.TaskVector.from_model(model)
    vector.save(tmp_path / "vector.safetensors")
    fresh = tiny_model("bert")
    loaded = linlora.TaskVector.load(tmp_path / "vector.safetensors")
    linlora.linearize(fresh, scope="model", point=loaded)
    linlora.apply(fresh, loaded)
    torch.testing.assert_close(fresh(**tiny_batch("bert")).logits, model(**tiny_batch("bert")).logits)


def test_several_adapters_add_in_the_tangent_space(double):
    model = tiny_model("bert", True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query", "value", "dense"]))
    randomize(model, 2)
    model.double()
    linlora.linearize(model, scope="model")
    model.base_model.set_adapter(["default", "other"])
    batch = tiny_batch("bert")
    randomize(model, 5, ("lora_dA", "lora_dB"))
    both = model(**batch).logits
    zeroed = []
    for name in ("other", "default"):
        saved = {n: p.detach().clone() for n, p in model.named_parameters() if f"lora_d{n[-1]}" and f".{name}" in n}
        with torch.no_grad():
            for n in saved:
                if "lora_d" in n:
                    model.get_parameter(n).zero_()
        zeroed.append(model(**batch).logits)
        with torch.no_grad():
            for n, value in saved.items():
                model.get_parameter(n).copy_(value)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_d" in n:
                p.zero_()
    base = model(**batch).logits
    torch.testing.assert_close(both - base, (zeroed[0] - base) + (zeroed[1] - base), rtol=1e-10, atol=1e-10)


def test_delinearize_and_a_copy_leave_nothing_behind():
    model = linearized("llama")
    twin = copy.deepcopy(model)
    plain = tiny_model("llama", True)
    types = {name: type(module) for name, module in plain.named_modules()}
    linlora.delinearize(twin)
    assert {name: type(module) for name, module in twin.named_modules()} == types
    assert not twin.get_base_model()._forward_hooks
    assert isinstance(model(**tiny_batch("llama"))[0], torch.Tensor)
    assert model.get_base_model()._forward_hooks


@pytest.mark.parametrize("architecture", ["llama", "t5", "gpt2"])
def test_a_model_is_pickled_whole(architecture, tmp_path):
    model, batch = linearized(architecture), tiny_batch(architecture)
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(twin(**batch)[0], model(**batch)[0])
    linlora.delinearize(twin)
    types = {name: type(module) for name, module in tiny_model(architecture, True).named_modules()}
    assert {name: type(module) for name, module in twin.named_modules()} == types


def test_disabled_adapters_give_the_base_model():
    model = linearized()
    with model.disable_adapter():
        disabled = model(**tiny_batch("bert")).logits
    torch.testing.assert_close(disabled, tiny_base("bert")(**tiny_batch("bert")).logits)


def test_what_only_layer_scope_can_do_is_refused_with_the_remedy(tmp_path):
    model = linearized()
    for action in (
        lambda: linlora.merge(model),
        lambda: model.merge_adapter(),
        lambda: linlora.export(model, tmp_path / "adapter"),
    ):
        with pytest.raises(ValueError, match=r"set_scope\(model, 'layer'\)"):
            action()
    assert not (tmp_path / "adapter").exists()


def test_conditions_are_checked_before_anything_changes():
    model = tiny_model("bert")
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2'.*attn_implementation='sdpa'"):
        linlora.linearize(model, scope="model")
    model = tiny_model("bert", bias="lora_only")
    with pytest.raises(ValueError, match=r"other parameters train: .*bias.*modules_to_save"):
        linlora.linearize(model, scope="model")
    model = tiny_model("bert", modules_to_save=["word_embeddings"])
    with pytest.raises(ValueError, match=r"word_embeddings.*not linear in what trains"):
        linlora.linearize(model, scope="model")
    with pytest.raises(ValueError, match="choose 'layer' or 'model'"):
        linlora.linearize(tiny_model("bert"), scope="network")
    with pytest.raises(ValueError, match="is not linearized"):
        linlora.set_scope(tiny_model("bert"), "model")


def test_an_adapter_added_later_has_to_be_linearized():
    model = linearized()
    model.add_adapter("late", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("late")
    with pytest.raises(ValueError, match=r"\['late'\] is not linearized"):
        model(**tiny_batch("bert"))


def test_a_base_weight_that_is_unfrozen_later_is_noticed():
    model = linearized()
    model.get_base_model().bert.encoder.layer[1].output.dense.base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layer 'bert.encoder.layer.1.output.dense': its base weight asks"):
        model(**tiny_batch("bert"))


@pytest.mark.parametrize(("architecture", "norm"), [("bert", "output.LayerNorm"), ("llama", "input_layernorm")])
def test_a_norm_that_is_unfrozen_later_is_noticed(architecture, norm):
    model = linearized(architecture)
    for name, module in model.named_modules():
        module.requires_grad_(name.endswith(f"1.{norm}")) if "lora_" not in name else None
    with pytest.raises(TangentError, match=rf"1\.{norm}.*freeze it"):
        model(**tiny_batch(architecture))


def test_a_wrong_input_names_layer_and_shape():
    layer = linearized().get_base_model().bert.encoder.layer[0].attention.self.query
    with pytest.raises(ValueError, match=r"layer 'bert.encoder.layer.0.attention.self.query': .*\(2, 31\)"):
        layer(torch.randn(2, 31))


def test_a_loss_of_unknown_make_is_refused():
    model = linearized()
    base = model.get_base_model()
    forward = base.forward

    def with_own_loss(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs["loss"] = outputs.logits.square().mean()
        return outputs

    base.forward = with_own_loss
    with pytest.raises(TangentError, match="computes its loss from functions that linlora does not know"):
        model(**tiny_batch("bert"))


def test_a_compiled_model_gives_the_same():
    torch._dynamo.reset()
    model, batch = linearized(), {**tiny_batch("bert"), "labels": torch.tensor([0, 1, 2])}
    compiled, expected = torch.compile(model, backend="aot_eager"), model(**batch)
    for _ in range(2):  # traced, and again
        output = compiled(**batch)
        assert list(output) == list(expected) == ["loss", "logits"]
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(output.logits, expected.logits)
