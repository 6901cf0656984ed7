"""Task vectors exported without a model: stock PEFT computes their function."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

import linlora
from linlora import TaskVector, formats
from linlora.formats.checkpoint import WrongBaseError
from linlora.formats.export import export_stored
from linlora.testing import ARCHITECTURES, randomize, tiny_base, tiny_batch, tiny_model


def linearized(architecture="bert", trained=True, seed=5, **options):
    model = tiny_model(architecture, trained, **options)
    linlora.linearize(model)
    randomize(model, seed, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    return model


def logits(model, architecture="bert"):
    return model(**tiny_batch(architecture))[0].detach()


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_peft_gives_the_same_logits(architecture, trained, tmp_path):
    model = linearized(architecture, trained)
    vector = TaskVector.from_model(model)
    tiny_base(architecture).save_pretrained(tmp_path / "base")
    linlora.export(vector, tmp_path / "a", base=tmp_path / "base")
    stock = PeftModel.from_pretrained(tiny_base(architecture), tmp_path / "a")
    torch.testing.assert_close(logits(stock, architecture), logits(model, architecture), rtol=1e-4, atol=1e-5)
    assert (formats.read(tmp_path / "a") - vector).norm() == 0.0
    assert formats.open(tmp_path / "a").config["base_model_name_or_path"] == str(tmp_path / "base")


def test_fused_vectors_export_what_apply_computes(tmp_path):
    vectors = [TaskVector.from_model(linearized(seed=seed)) for seed in (1, 2, 3)]
    fused = linlora.fuse(vectors, "ties", keep=0.5)
    linlora.export(fused, tmp_path)
    model = linearized()
    linlora.apply(model, fused)
    stock = PeftModel.from_pretrained(tiny_base("bert"), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)


def test_plain_vectors_export_their_factors(tmp_path):
    model = tiny_model("bert", trained=True)
    start = TaskVector.from_model(model)
    randomize(model, 9)
    linlora.export(TaskVector.from_model(model, point=start), tmp_path / "a")
    stock = PeftModel.from_pretrained(tiny_base("bert"), tmp_path / "a")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "p")
    linlora.export(formats.read(tmp_path / "p"), tmp_path / "again")
    assert not (tmp_path / "again" / "task_vector.safetensors").exists()
    assert (formats.read(tmp_path / "again") - formats.read(tmp_path / "p")).norm() == 0.0


def test_ranks_and_scalings_that_differ_from_layer_to_layer(tmp_path):
    options = {"use_rslora": True, "rank_pattern": {"dense": 2}, "alpha_pattern": {"query": 5}}
    model = linearized(**options)
    linlora.export(TaskVector.from_model(model), tmp_path)
    stock = PeftModel.from_pretrained(tiny_base("bert"), tmp_path)
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)


def test_a_bfloat16_vector_loses_nothing(tmp_path):
    """B0 + dB is no bfloat16 number, so those factors are written in float32; what needs no sum stays as it is."""
    model = linearized()
    vector = TaskVector.from_model(model.bfloat16())
    linlora.export(vector, tmp_path / "pair")
    with safe_open(tmp_path / "pair" / "adapter_model.safetensors", "pt") as file:
        name = "base_model.model.bert.pooler.dense.lora_"
        A, B = file.get_tensor(f"{name}A.weight"), file.get_tensor(f"{name}B.weight")
    layer = "bert.pooler.dense"
    dB, B0 = vector.deltas[f"{layer}.dB"].float(), vector.point[f"{layer}.B0"].float()
    assert (A.dtype, B.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(B, torch.cat([B0 + dB, B0], dim=1))


@pytest.mark.parametrize(
    ("trained", "options"), [("bias", {"bias": "all"}), ("tokens", {"trainable_token_indices": [1, 2]})]
)
def test_biases_and_tokens_trained_beside_an_adapter_are_taken_over(tmp_path, trained, options):
    model = tiny_model("bert", trained=True, target_modules=["query"], **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and trained in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "p")
    export_stored(formats.open(tmp_path / "p"), tmp_path / "a")
    before, after = (PeftModel.from_pretrained(tiny_base("bert"), tmp_path / folder) for folder in "pa")
    torch.testing.assert_close(linlora.merge(after).state_dict(), linlora.merge(before).state_dict())


def test_a_head_and_the_task_type_are_taken_over(tmp_path):
    model = linearized(modules_to_save=["classifier"], task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    linlora.export(model, tmp_path / "whole")
    vector = TaskVector.from_model(model)
    linlora.export(vector, tmp_path / "a", base=tmp_path / "whole")
    stock = PeftModel.from_pretrained(tiny_base("bert"), tmp_path / "a")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


class TestRefusals:
    def test_model_scope(self, tmp_path):
        vector = TaskVector.from_model(linearized()).cast("model")
        with pytest.raises(ValueError, match=r"linearized as a whole.*vector.cast\('layer'\)"):
            linlora.export(vector, tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_no_point(self, tmp_path):
        TaskVector.from_model(linearized()).save(tmp_path / "v.safetensors", include_point=False)
        with pytest.raises(ValueError, match="saved without its point"):
            linlora.export(TaskVector.load(tmp_path / "v.safetensors"), tmp_path / "a")

    def test_another_base(self, tmp_path):
        vector = TaskVector.from_model(linearized())
        tiny_base("llama").save_pretrained(tmp_path / "llama")
        with pytest.raises(WrongBaseError, match="no weight for 11 of 11 adapted layers"):
            linlora.export(vector, tmp_path / "a", base=tmp_path / "llama")
        tiny_model("bert", target_modules=["query"]).save_pretrained(tmp_path / "query")
        with pytest.raises(linlora.DifferentPointError, match="cover different layers"):
            linlora.export(vector, tmp_path / "a", base=tmp_path / "query")
        assert not (tmp_path / "a").exists()


def test_an_exported_folder_holds_no_vector_of_the_adapter_before(tmp_path):
    linlora.export(linearized(), tmp_path)
    plain = tiny_model("bert", trained=True)
    linlora.export(plain, tmp_path)
    assert not (tmp_path / "task_vector.safetensors").exists()
    linlora.export(linearized(), tmp_path)
    plain.save_pretrained(tmp_path / "p")
    linlora.export(formats.read(tmp_path / "p"), tmp_path)
    assert formats.open(tmp_path).kind == "PEFT LoRA adapter"


def test_an_interrupted_export_leaves_the_adapter_before(tmp_path, monkeypatch):
    linlora.export(linearized(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("linlora.vectors.files.save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        linlora.export(TaskVector.from_model(linearized(seed=9)), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
