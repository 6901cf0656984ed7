"""linearize, delinearize, accelerate on PEFT models of every make, and what they refuse."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from torch import nn

import linlora
from linlora.layers.lora_linear import ConvertedLoraLinear, converted_layers
from linlora.testing import ARCHITECTURES, randomize, tiny_base, tiny_batch, tiny_model


def logits(model, architecture="bert"):
    return model(**tiny_batch(architecture))[0].detach()


def mlp(**options):
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    return get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["0", "2"], **options}))


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linearizing_keeps_the_function_and_copies_no_weight(architecture, trained):
    model = tiny_model(architecture, trained)
    before = logits(model, architecture)
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    report = linlora.linearize(model)
    torch.testing.assert_close(logits(model, architecture), before, rtol=1e-4, atol=1e-5)
    after = {n: p.data_ptr() for n, p in model.named_parameters()}
    assert pointers.items() <= after.items()
    assert {name.rsplit(".", 2)[-2] for name in after.keys() - pointers.keys()} == (
        {"lora_dA", "lora_dB"} if trained else set()
    )
    assert {layer.state for layer in report.layers} == {"pair" if trained else "short"}


def test_fresh_adapter_trains_B_alone_and_trained_adapter_trains_dA_and_dB():
    fresh, trained = tiny_model("bert"), tiny_model("bert", trained=True)
    for model in (fresh, trained):
        linlora.linearize(model)
    assert {n.split(".")[-3] for n, p in fresh.named_parameters() if p.requires_grad} == {"lora_B"}
    assert {n.split(".")[-2] for n, p in trained.named_parameters() if p.requires_grad} == {"lora_dA", "lora_dB"}


def test_report_says_what_happened():
    model = tiny_model("bert", modules_to_save=["classifier"])
    text = str(linlora.linearize(model))
    assert "linearized (layer scope) 11 LoRA layers" in text
    assert "2 x query" in text
    assert "32 -> 32, rank 4, scaling 2" in text
    assert "A is frozen and B alone trains" in text
    assert "left alone: classifier (ModulesToSaveWrapper" in text
    assert "backend: torch" in text
    assert f"trainable parameters: {sum(p.numel() for p in model.parameters() if p.requires_grad):,}" in text


def test_modules_to_save_keep_training():
    model = tiny_model("bert", modules_to_save=["classifier"])
    linlora.linearize(model)
    model(**tiny_batch("bert")).logits.sum().backward()
    assert model.base_model.model.classifier.modules_to_save["default"].weight.grad is not None


def test_rslora_and_rank_and_alpha_patterns():
    model = mlp(use_rslora=True, lora_alpha=6, r=4, rank_pattern={"2": 2}, alpha_pattern={"2": 10})
    report = linlora.linearize(model)
    assert [(layer.rank, layer.scaling) for layer in report.layers] == [(4, 3.0), (2, pytest.approx(10 / 2**0.5))]


def test_conv1d_targets():
    model = tiny_model("gpt2", trained=True)
    before = logits(model, "gpt2")
    linlora.linearize(model)
    layer = model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert isinstance(layer, ConvertedLoraLinear)
    assert layer.fan_in_fan_out
    torch.testing.assert_close(logits(model, "gpt2"), before, rtol=1e-4, atol=1e-5)


def test_several_adapters_switch_and_stack():
    model = tiny_model("bert", trained=True)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=["query", "dense"]))
    randomize(model, 3)
    expected = {}
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        expected[str(active)] = logits(model)
    report = linlora.linearize(model)
    assert {(layer.adapter, layer.rank) for layer in report.layers} == {("default", 4), ("second", 3)}
    for active in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(active)
        torch.testing.assert_close(logits(model), expected[str(active)], rtol=1e-4, atol=1e-5)
    randomize(model, 4, ("lora_dA", "lora_dB"))
    stacked = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), stacked, rtol=1e-4, atol=1e-5)


def test_switching_adapters_never_unfreezes_the_point():
    model = tiny_model("bert", trained=True)
    model.add_adapter("fresh", LoraConfig(r=3, target_modules=["query"]))
    linlora.linearize(model)
    for name in ("fresh", "default", "fresh"):
        model.set_adapter(name)
        trainable = {n.split("lora_")[-1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == ({"B"} if name == "fresh" else {"dA", "dB"})
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n)


def test_an_adapter_added_later_is_plain_lora():
    model = tiny_model("bert")
    linlora.linearize(model)
    model.add_adapter("later", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("later")
    stock = copy.deepcopy(model)
    linlora.delinearize(stock)
    randomize(model, 8)
    randomize(stock, 8)
    torch.testing.assert_close(logits(model), logits(stock))
    assert {n.split("lora_")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B"}


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "lora_bias"])
def test_an_adapter_that_is_not_vanilla_is_refused_later_too(options):
    model = mlp()
    linlora.linearize(model)
    with pytest.raises(ValueError, match=r"layer '0': adapter 'later' cannot be added .*(DoRA|lora_bias=True)"):
        model.add_adapter("later", LoraConfig(r=2, target_modules=["0", "2"], **options))
    assert not any("later" in name for name in model.state_dict())
    model.add_adapter("later", LoraConfig(r=2, target_modules=["0", "2"]))


@pytest.mark.parametrize("trained", [False, True], ids=["short", "pair"])
def test_a_linearized_adapter_is_not_made_anew_as_a_plain_one(trained):
    model = mlp(init_lora_weights="eva")
    if trained:
        randomize(model)
    linlora.linearize(model)
    layers = {name: layer.states["default"] for name, layer in converted_layers(model)}
    of_another_rank = {f"base_model.model.{name}": torch.eye(3, 8)[:, : 6 if name == "0" else 8] for name in layers}
    with pytest.raises(ValueError, match=r"layer '0': adapter 'default' is linearized.*linlora\.delinearize the model"):
        initialize_lora_eva_weights(model, eva_state_dict=dict(of_another_rank))
    assert {name: layer.states["default"] for name, layer in converted_layers(model)} == layers
    linlora.delinearize(model)
    initialize_lora_eva_weights(model, eva_state_dict=dict(of_another_rank))
    assert {
        name: layer.rank for name, layer in zip(layers, linlora.linearize(model).layers, strict=True)
    } == dict.fromkeys(layers, 3)


def test_a_deleted_adapter_is_gone_everywhere(tmp_path):
    model = tiny_model("bert", trained=True)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["query"]))
    randomize(model, 3)
    linlora.linearize(model)
    model.delete_adapter("default")
    assert not any("default" in name for name in model.state_dict())
    assert all("default" not in layer.states for _, layer in converted_layers(model))
    model.save_pretrained(tmp_path)
    linlora.delinearize(model)


def test_disabling_and_merging_behave_as_in_peft():
    model = tiny_model("bert", trained=True)
    with model.disable_adapter():
        base = logits(model)
    linlora.linearize(model)
    randomize(model, 4, ("lora_dA", "lora_dB"))
    trained = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)


def test_delinearize_gives_the_peft_model_back():
    model, stock = tiny_model("bert"), tiny_model("bert")
    linlora.linearize(model)
    randomize(model, 4, ("lora_B",))
    randomize(stock, 4, ("lora_B",))
    linearized = logits(model)
    assert linlora.delinearize(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in stock.named_parameters()
    ]
    torch.testing.assert_close(logits(model), linearized)  # B0 = 0: the same function
    torch.testing.assert_close(logits(model), logits(stock))


@pytest.mark.parametrize("scope", ["plain", "layer", "model"])
def test_hooks_of_base_layers_run_as_in_peft(scope):
    model, x = mlp().double(), torch.randn(5, 6).double()
    randomize(model)
    for index in (0, 2):  # the first has no tangent before it
        model.base_model.model[index].base_layer.register_forward_hook(lambda module, args, output: output.sin())
    oracle = copy.deepcopy(model)
    linlora.accelerate(model) if scope == "plain" else linlora.linearize(model, scope=scope)
    with pytest.warns(UserWarning, match="layer '[02]': its base layer has hooks, so it is called"):
        actual = model(x)
    torch.testing.assert_close(actual, oracle(x))
    actual.square().sum().backward()
    oracle(x).square().sum().backward()
    for name, expected in oracle.named_parameters():
        name = name if scope == "plain" else name.replace("lora_", "lora_d").replace(".weight", "")
        if expected.requires_grad:
            torch.testing.assert_close(model.get_parameter(name).grad, expected.grad)
    model.eval()
    if scope != "model":
        with pytest.warns(UserWarning, match="layer '[02]': its base layer has hooks, so all of them are called"):
            torch.testing.assert_close(model(x, adapter_names=["default"] * 5), oracle(x))


@pytest.mark.filterwarnings("ignore:.*its base layer has hooks")
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_base_layers_run_or_are_refused(kind):
    model, x, called = mlp(), torch.randn(5, 6), []
    linlora.linearize(model)
    getattr(model.base_model.model[2].base_layer, kind)(lambda *_: called.append(kind))
    model(x).sum().backward()
    assert called == [kind]
    linlora.set_scope(model, "model")
    with pytest.raises(RuntimeError, match="BackwardHookFunction"):
        model(x)


def test_delinearize_leaves_what_trains_of_a_plain_adapter_alone():
    model = tiny_model("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    linlora.accelerate(model)
    linlora.delinearize(model)
    assert {n.split("lora_")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {"B"}


def test_delinearize_of_a_trained_adapter_gives_point_plus_delta():
    model = tiny_model("llama", trained=True)
    A0 = next(layer.lora_A.default.weight.clone() for layer in model.modules() if hasattr(layer, "lora_A"))
    linlora.linearize(model)
    randomize(model, 4, ("lora_dA", "lora_dB"))
    dA = next(layer.lora_dA["default"].clone() for _, layer in converted_layers(model))
    linlora.delinearize(model)
    A = next(layer.lora_A.default.weight for layer in model.modules() if hasattr(layer, "lora_A"))
    torch.testing.assert_close(A, A0 + dA)
    assert not any("lora_d" in name for name in model.state_dict() if "lora_dropout" not in name)
    assert "save_pretrained" not in model.__dict__


def test_deep_copies_are_independent():
    model = tiny_model("bert", trained=True)
    linlora.linearize(model)
    twin = copy.deepcopy(model)
    randomize(model, 4, ("lora_dA", "lora_dB"))
    assert not torch.allclose(logits(model), logits(twin))
    assert twin.save_pretrained.args[0] is twin


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama", trained=True, lora_dropout=0.3)
        linlora.linearize(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(**tiny_batch("llama")).logits.sin().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_whole_model_compiles_in_one_graph():
    model = tiny_model("bert", trained=True)
    linlora.linearize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**tiny_batch("bert")).logits, model(**tiny_batch("bert")).logits)


class TestRefusals:
    def test_not_a_peft_model(self):
        with pytest.raises(TypeError, match=r"PeftModel, got Linear: wrap it with peft.get_peft_model"):
            linlora.linearize(nn.Linear(2, 2))

    def test_unknown_scope(self):
        with pytest.raises(ValueError, match="unknown scope 'network'"):
            linlora.linearize(tiny_model(), scope="network")

    def test_no_lora_layer_lists_the_candidates(self):
        model = tiny_model("bert").base_model.unload()
        with pytest.raises(linlora.NoLoraLayerError, match=r"classifier, dense, key, query, value"):
            linlora.accelerate(model)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias=True")],
        ids=["dora", "lora_bias"],
    )
    def test_variants_are_named_with_layer_and_reason(self, options, reason):
        with pytest.raises(linlora.UnsupportedLayerError, match=rf"(?s)'0': .*{reason}"):
            linlora.linearize(mlp(**options))

    def test_embedding_and_convolution_adapters(self):
        base = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "conv": nn.Conv2d(1, 2, 3), "linear": nn.Linear(4, 4)})
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["embedding", "conv", "linear"]))
        with pytest.raises(linlora.UnsupportedLayerError, match=r"(?s)'embedding': .*Embedding.*'conv': .*Conv2d"):
            linlora.linearize(model)
        assert not any(isinstance(m, ConvertedLoraLinear) for m in model.modules())  # refused whole, not half done

    def test_linearizing_twice(self):
        model = tiny_model()
        linlora.linearize(model)
        with pytest.raises(ValueError, match=r"query': adapter \['default'\] is linearized already; call delinearize"):
            linlora.linearize(model)

    def test_merged_adapter(self):
        model = tiny_model()
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"adapters \['default'\] are merged; call model.unmerge_adapter"):
            linlora.linearize(model)

    def test_nan_in_the_adapter(self):
        model = mlp()
        model.base_model.model[2].lora_A.default.weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"'2': lora_A of adapter 'default' holds NaN"):
            linlora.linearize(model)

    def test_delinearize_of_a_stock_model(self):
        with pytest.raises(ValueError, match="no linearized or accelerated layer"):
            linlora.delinearize(tiny_model())

    def test_wrong_input_names_the_layer(self):
        model = mlp()
        linlora.linearize(model)
        layer = model.base_model.model[2]
        with pytest.raises(ValueError, match=r"layer '2': the input \(3, 5\) has 5 features .* takes 8"):
            layer(torch.randn(3, 5))
        with pytest.raises(ValueError, match=r"layer '2': the input is torch.float16, the layer torch.float32"):
            layer(torch.randn(3, 8).half())
        with pytest.raises(ValueError, match=r"layer '2': the input is on meta"):
            layer(torch.randn(3, 8, device="meta"))
        with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same .* got 3 and 2"):
            layer(torch.randn(2, 8), adapter_names=["default"] * 3)

    def test_different_dropouts_of_stacked_adapters(self):
        model = mlp(lora_dropout=0.1)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5))
        linlora.linearize(model)
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match=r"layer '0': .*different dropouts \[0.1, 0.5\]"):
            model.train()(torch.randn(2, 6))


def test_dropout_only_in_training():
    model = mlp(lora_dropout=0.5)
    linlora.linearize(model)
    randomize(model, 1, ("lora_B",), scale=1.0)
    x = torch.randn(16, 6)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_from_pretrained_adapter_can_be_linearized(tmp_path):
    model = tiny_model("bert", trained=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base("bert"), tmp_path)
    report = linlora.linearize(loaded)
    assert report.trainable == 0
    assert "is_trainable=True" in str(report)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_the_report_of_lora_fa_says_that_A_is_frozen():
    model = tiny_model("bert")
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    report = linlora.accelerate(model)
    assert {layer.state for layer in report.layers} == {"frozen A"}
    assert "B alone trains, LoRA-FA" in str(report)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
