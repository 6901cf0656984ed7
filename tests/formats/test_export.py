"""Leaving linlora: stock PEFT and plain transformers models compute the same function."""

import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

import linlora
from linlora.storage.tensor_files import TensorFile
from linlora.testing import ARCHITECTURES, randomize, tiny_base, tiny_batch, tiny_model


def linearized(architecture="bert", trained=True, **options):
    model = tiny_model(architecture, trained, **options)
    linlora.linearize(model)
    randomize(model, 5, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    return model


def logits(model, architecture="bert"):
    return model(**tiny_batch(architecture))[0].detach()


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exported_adapter_gives_the_same_logits_in_stock_peft(architecture, trained, tmp_path):
    model = linearized(architecture, trained)
    linlora.export(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == (8 if trained else 4)
    stock = PeftModel.from_pretrained(tiny_base(architecture), tmp_path)
    torch.testing.assert_close(logits(stock, architecture), logits(model, architecture), rtol=1e-4, atol=1e-5)
    vector = linlora.TaskVector.load(tmp_path / "task_vector.safetensors")
    assert (vector - linlora.TaskVector.from_model(model)).norm() == 0.0


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_exported_files_have_the_permissions_of_the_user_s_others(tmp_path, mask):
    before = os.umask(mask)
    try:
        linlora.export(linearized(), tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("assigned", [False, True], ids=["copied", "assigned"])
def test_save_pretrained_writes_the_same_and_a_linearized_model_resumes_from_it(tmp_path, trained, assigned):
    model = linearized(trained=trained, modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny_base("bert"), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
    resumed = tiny_model("bert", trained, modules_to_save=["classifier"])
    linlora.linearize(resumed)
    resumed.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=assigned)
    factors = [p for name, p in resumed.named_parameters() if "lora_" in name]
    assert all(factor.is_contiguous() for factor in factors)
    assert len({factor.untyped_storage().data_ptr() for factor in factors}) == len(factors)
    torch.testing.assert_close(logits(resumed), logits(model), rtol=1e-4, atol=1e-5)
    difference = linlora.TaskVector.from_model(resumed) - linlora.TaskVector.from_model(model)
    assert difference.norm() < 1e-5
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, resumed)]
    assert names[0] == names[1]


def test_a_plain_adapter_loaded_over_a_linearized_one_has_its_function(tmp_path):
    plain = tiny_model("bert", trained=True)
    plain.save_pretrained(tmp_path)
    model = tiny_model("bert")
    randomize(model, 4)
    linlora.linearize(model)
    randomize(model, 5, ("lora_dA", "lora_dB"))
    model.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(model), logits(plain))
    assert linlora.TaskVector.from_model(model).norm() == 0.0


def test_weighted_adapters_of_peft_are_exact_or_refused():
    model = linearized(trained=True, lora_alpha=4)  # PEFT 0.18 applies the scaling twice
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=4, target_modules=["query"]))
    model.set_adapter("default")
    expected = logits(model)
    for names, combination in ((["default", "second"], "cat"), (["default", "second"], "linear"), (["default"], "svd")):
        with pytest.raises(ValueError, match=r"\['default'\] are the linearization point"):
            model.add_weighted_adapter(names, [1.0] * len(names), "both", combination_type=combination)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="svd", svd_rank=8)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    linlora.delinearize(model).add_weighted_adapter(["default"], [1.0], "again", combination_type="linear")


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_model_is_plain_and_gives_the_same_logits(architecture, trained):
    model = linearized(architecture, trained)
    expected = logits(model, architecture)
    merged = linlora.merge(model)
    assert type(merged) is type(tiny_base(architecture))
    assert merged.state_dict().keys() == tiny_base(architecture).state_dict().keys()
    torch.testing.assert_close(logits(merged, architecture), expected, rtol=1e-4, atol=1e-5)


def test_merge_rounds_once_from_fp32():
    """In bf16, W + ΔW has to be the nearest bf16 to the fp32 sum, for a plain adapter too."""
    base = nn.Sequential(nn.Linear(32, 24)).bfloat16()
    for linearize in (False, True):
        model = get_peft_model(nn.Sequential(nn.Linear(32, 24)).bfloat16(), LoraConfig(r=4, target_modules=["0"]))
        model.base_model.model[0].base_layer.load_state_dict(base[0].state_dict())
        randomize(model, 2)
        A, B = (getattr(model.base_model.model[0], f"lora_{kind}").default.weight.float() for kind in "AB")
        expected = (base[0].weight.float() + 2.0 * B @ A).bfloat16()  # lora_alpha 8, r 4
        if linearize:
            linlora.linearize(model)
        assert torch.equal(linlora.merge(model)[0].weight, expected)


def test_rslora_patterns_and_mixed_starts_export_exactly(tmp_path):
    def build():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2", "3"], use_rslora=True, rank_pattern={"2": 2},
                            alpha_pattern={"2": 10})  # fmt: skip
        return base, config

    base, config = build()
    model = get_peft_model(base, config)
    with torch.no_grad():
        model.base_model.model[2].lora_B.default.weight.normal_()  # layer 2 starts at B0 != 0, the others at 0
    report = linlora.linearize(model)
    assert [layer.state for layer in report.layers] == ["short", "pair", "short"]
    randomize(model, 3, ("lora_dA", "lora_dB"))
    with torch.no_grad():
        model.base_model.model[0].lora_B.default.weight.normal_()
    linlora.export(model, tmp_path)
    x = torch.randn(5, 6)
    stock = PeftModel.from_pretrained(build()[0], tmp_path)
    torch.testing.assert_close(stock(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linearized", "plain"])
def test_only_the_named_adapter_is_exported(tmp_path, kind):
    model = tiny_model("bert", trained=True)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["query"]))
    randomize(model, 2)
    if kind == "linearized":
        linlora.linearize(model)
    model.set_adapter("second")
    linlora.export(model, tmp_path, adapter="second")
    vector = ["task_vector.safetensors"] * (kind == "linearized")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", *vector,
    ]  # fmt: skip
    stock = PeftModel.from_pretrained(tiny_base("bert"), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
    assert model.peft_config["second"].r == 3  # the live model is as it was
    for name in vector:
        assert "adapter" in TensorFile(tmp_path / name).metadata  # the digest of what lies beside it


def test_a_plain_adapter_is_exported_without_a_vector_it_does_not_have(tmp_path):
    model = tiny_model("bert", trained=True)
    linlora.export(model, tmp_path)
    assert not (tmp_path / "task_vector.safetensors").exists()
    stock = PeftModel.from_pretrained(tiny_base("bert"), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model))


def test_a_killed_export_leaves_the_previous_adapter_whole(tmp_path, monkeypatch):
    model = linearized()
    linlora.export(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    randomize(model, 9, ("lora_dA", "lora_dB"))

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("linlora.vectors.files.save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        linlora.export(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize("make", [linearized, lambda: tiny_model("bert", trained=True)], ids=["linearized", "plain"])
def test_an_adapter_that_would_not_be_read_is_not_written(make, tmp_path):
    model = make()
    linlora.export(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"adapter 'default' holds NaN or infinity in '.*lora_A.*'; nothing was written"
    ):
        linlora.export(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_merge_names_an_adapter_that_is_not_there():
    with pytest.raises(ValueError, match=r"no adapter \['typo'\]; the model has \['default'\]"):
        linlora.merge(linearized(), ["typo"])


def test_merge_refuses_nan_and_leaves_the_model_whole():
    model = linearized()
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.query")
    weight = layer.weight.clone()
    layer.lora_dB["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'bert.encoder.layer.1.*query': adapter 'default' holds NaN"):
        linlora.merge(model)
    assert torch.equal(layer.weight, weight)
    with pytest.raises(TypeError, match="PeftModel"):
        linlora.merge(tiny_base("bert"))


@pytest.mark.parametrize("function", ["export", "merge"])
def test_a_model_of_another_kind_is_refused_with_what_serves_a_routed_one(function, tmp_path):
    routed = linlora.routing.route(linlora.testing.tiny_base("bert"), n_tasks=2, target_modules=["query"])
    with pytest.raises(TypeError, match=rf"{function} takes a PeftModel.*linlora\.routing\.{function}_task"):
        getattr(linlora, function)(routed, *([tmp_path] if function == "export" else []))


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_of_linlora_0_1_is_loaded(strict):
    saved, fresh = linearized(trained=True), tiny_model("bert", trained=True)
    linlora.linearize(fresh)
    state = {key.replace("of_lora_B.lora_dB", "lora_dB"): value for key, value in saved.state_dict().items()}
    assert not fresh.load_state_dict(state, strict=strict).unexpected_keys
    assert torch.equal(logits(fresh, "bert"), logits(saved, "bert"))


def test_pefts_state_dict_of_an_adapter_has_its_function():
    saved = linearized(trained=True)
    factors, resumed = get_peft_model_state_dict(saved), tiny_model("bert", trained=True)
    stock, smaller = tiny_model("bert", r=8, lora_alpha=16), tiny_model("bert")
    linlora.linearize(resumed)
    for model in (stock, resumed):
        assert not set_peft_model_state_dict(model, factors).unexpected_keys
        torch.testing.assert_close(logits(model), logits(saved), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(smaller, factors)
    assert any("lora_dA" in key for key in saved.state_dict())


def test_a_state_dict_given_to_pefts_is_refused_where_it_holds_the_point():
    for trained in (True, False):
        model = linearized(trained=trained)
        if trained:
            with pytest.raises(ValueError, match=r"A and B of \['default'\] are the linearization point"):
                get_peft_model_state_dict(model, model.state_dict())
            linlora.delinearize(model)
        assert len(get_peft_model_state_dict(model, model.state_dict())) == 22


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_pefts_reduction_of_intruders_is_of_what_a_layer_adds_or_refused(scope):
    """At B0 = 0 and layer scope the copy of A and B is the adapter; elsewhere they are not what training gave."""
    reduce_intruder_dimension = pytest.importorskip("peft.tuners.lora.intruders").reduce_intruder_dimension
    for trained, accelerated in ((True, False), (True, True), (False, False)):
        model = linearized(trained=trained)
        linlora.set_scope(model, scope)
        if accelerated:
            linlora.accelerate(model)  # which converts layers added later, and leaves the others linearized
        names = set(model.state_dict())
        if trained or scope == "model":
            with pytest.raises(ValueError, match=r"reduce_intruder_dimension: it (copies lora_A|changes ΔW)"):
                reduce_intruder_dimension(model, threshold_epsilon=0.0, logging_sink=None)
            assert set(model.state_dict()) == names
            assert list(model.peft_config) == ["default"]
        else:
            expected = logits(model)
            reduce_intruder_dimension(model, threshold_epsilon=0.0, logging_sink=None)
            torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
