"""Adapters of every age and origin as task vectors."""

import json
from collections import OrderedDict

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import linlora
from linlora import TaskVector, formats
from linlora.formats.vector_folder import save_beside
from linlora.testing import randomize, relative_error, tiny_base, tiny_batch, tiny_model


def logits(model):
    return model(**tiny_batch("bert")).logits.detach()


@pytest.fixture
def adapter(tmp_path):
    """A plain PEFT adapter and its logits."""
    model = tiny_model("bert", trained=True, use_rslora=True, rank_pattern={"dense": 2}, alpha_pattern={"query": 5})
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def config(folder, **changes):
    path = folder / "adapter_config.json"
    kept = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))


def put_into_a_model(vector, **options):
    model = tiny_model("bert", **options)
    linlora.apply(model, vector)
    return logits(model)


def test_a_plain_adapter_computes_what_it_did(adapter):
    folder, expected = adapter
    vector = formats.read(folder)
    assert (vector.scope, vector.point) == ("weight", {})
    options = {"use_rslora": True, "rank_pattern": {"dense": 2}, "alpha_pattern": {"query": 5}}
    torch.testing.assert_close(put_into_a_model(vector, **options), expected, rtol=1e-5, atol=1e-6)
    model = tiny_model("bert", **options)
    assert vector.scalings == TaskVector.from_model(model).scalings


@pytest.mark.parametrize("spelling", ["default", "no prefix", "pickle", "pickle, old zip"])
def test_older_spellings_read_the_same(adapter, spelling):
    folder, _ = adapter
    expected = formats.read(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    if spelling == "default":
        tensors = {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
    if spelling == "no prefix":
        tensors = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    if spelling.startswith("pickle"):
        new = spelling == "pickle"
        torch.save(OrderedDict(tensors), folder / "adapter_model.bin", _use_new_zipfile_serialization=new)
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    vector = formats.read(folder)
    assert vector.deltas.keys() == expected.deltas.keys()
    assert (vector - expected).norm() == 0.0
    assert ("pickle" in str(formats.open(folder).notes)) == spelling.startswith("pickle")


def test_configs_that_lack_today_s_fields(tmp_path):
    tiny_model("bert", trained=True).save_pretrained(tmp_path)
    missing = dict.fromkeys(("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "peft_type"), ...)
    config(tmp_path, **missing)
    assert set(formats.read(tmp_path).scalings.values()) == {2.0}


def test_a_head_trained_beside_the_adapter_is_no_part_of_the_vector_but_there(tmp_path):
    model = tiny_model("bert", trained=True, modules_to_save=["classifier"], bias="all")
    model.save_pretrained(tmp_path)
    stored = formats.open(tmp_path)
    base = tiny_base("bert").state_dict()
    assert {"classifier.weight", "classifier.bias", "bert.pooler.dense.bias"} <= stored.extras.keys() <= base.keys()
    torch.testing.assert_close(stored.extras["classifier.weight"], base["classifier.weight"])
    assert not any("classifier" in name for name in stored.vector.deltas)


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
def test_a_linlora_folder_is_its_task_vector(tmp_path, trained):
    model = tiny_model("bert", trained, modules_to_save=["classifier"])
    linlora.linearize(model)
    randomize(model, 3, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    linlora.export(model, tmp_path)
    stored = formats.open(tmp_path)
    assert (stored.vector - TaskVector.from_model(model)).norm() == 0.0
    assert sorted(stored.extras) == ["classifier.bias", "classifier.weight"]
    assert (formats.read(tmp_path / "task_vector.safetensors") - stored.vector).norm() == 0.0


def vector_beside_its_adapter(folder, scope, dtype):
    """A folder in which a task vector lies beside the adapter that it is."""
    model = tiny_model("bert", trained=scope != "B0=0")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    start = TaskVector.from_model(model)
    if scope == "lora":
        randomize(model, 8)
        linlora.export(model, folder)
        save_beside(TaskVector.from_model(model, point=start), folder)
    else:
        linlora.linearize(model)
        randomize(model, 8, ("lora_dA", "lora_dB") if scope == "B0!=0" else ("lora_B",))
        linlora.export(model, folder)


def next_number(factors):
    name = min(factors)
    bits = factors[name].view({2: torch.int16, 4: torch.int32}[factors[name].element_size()])
    bits[0, 0] += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", ["lora", "B0=0", "B0!=0"])
def test_a_folder_whose_adapter_was_saved_over_is_of_no_vector(tmp_path, scope, dtype):
    """However little the two differ: by the next number of one value, or by the scaling."""
    vector_beside_its_adapter(tmp_path, scope, dtype)
    stock = PeftModel.from_pretrained(tiny_base("bert"), tmp_path, autocast_adapter_dtype=False)
    stock.save_pretrained(tmp_path)
    assert formats.read(tmp_path).scope == ("lora" if scope == "lora" else "layer")  # the same adapter still
    file = tmp_path / "adapter_model.safetensors"
    factors = load_file(file)
    before = {name: factor.clone() for name, factor in factors.items()}
    next_number(factors)
    alpha = json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"]
    for changed, new_alpha in ((factors, alpha), (before, alpha * (1 + 2**-50))):
        save_file(changed, file, {"format": "pt"})
        config(tmp_path, lora_alpha=new_alpha)
        with pytest.raises(linlora.CorruptFileError, match="of different adapters"):
            formats.open(tmp_path)
    config(tmp_path, lora_alpha=alpha)
    assert formats.read(tmp_path).scope == ("lora" if scope == "lora" else "layer")


@pytest.mark.parametrize("scope", ["lora", "B0=0", "B0!=0"])
def test_a_folder_without_a_digest_is_read_where_its_files_agree_up_to_rounding(tmp_path, scope):
    vector_beside_its_adapter(tmp_path, scope, torch.float32)
    vector, file = formats.read(tmp_path), tmp_path / "adapter_model.safetensors"
    vector.save(tmp_path / "task_vector.safetensors")
    factors = load_file(file)
    next_number(factors)
    save_file(factors, file, {"format": "pt"})
    assert (formats.read(tmp_path) - vector).norm() == 0.0
    factors[min(factors)][0, 0] += 1e-3
    save_file(factors, file, {"format": "pt"})
    with pytest.raises(linlora.CorruptFileError, match="of different adapters"):
        formats.open(tmp_path)


def test_a_vector_saved_beside_the_plain_adapter_it_ends_at_is_read(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("bert", trained=True)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        start = TaskVector.from_model(model)
        randomize(model, 8)
        model.save_pretrained(tmp_path)
        TaskVector.from_model(model, point=start).save(tmp_path / "task_vector.safetensors")
        assert formats.read(tmp_path).scope == "lora"


def test_one_parameter_by_two_names_has_one_value(adapter):
    path = adapter[0] / "adapter_model.safetensors"
    names = [f"base_model.model.classifier.{part}bias" for part in ("", "modules_to_save.")]
    save_file(load_file(path) | {name: torch.ones(3) for name in names}, path)
    assert list(formats.open(adapter[0]).extras) == ["classifier.bias"]
    save_file(load_file(path) | {names[0]: torch.zeros(3)}, path)
    with pytest.raises(linlora.CorruptFileError, match="one parameter with two values"):
        formats.open(adapter[0])


class Linearized(nn.Module):
    """What the L-LoRA checkpoints were made of: a layer, a copy of its parameters, and a jvp between them."""

    def __init__(self, layer):
        super().__init__()
        self.model = layer
        self.params0_values = nn.ParameterList([p.detach().clone() for p in layer.parameters()])

    def forward(self, x):
        names = [name for name, _ in self.model.named_parameters()]
        start, now = tuple(self.params0_values), tuple(self.model.parameters())
        out, tangent = torch.func.jvp(
            lambda *p: torch.func.functional_call(self.model, dict(zip(names, p, strict=True)), (x,)),
            start,
            tuple(p - p0 for p, p0 in zip(now, start, strict=True)),
        )
        return out + tangent


def published_l_lora(folder, trained):
    """A checkpoint in the published layout, made as it is made there, and the logits of its model."""
    model = tiny_model("bert", trained)
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linearized(module))
    randomize(model, 7)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, Linearized):
            pairs = zip(module.model.named_parameters(), module.params0_values.named_parameters(), strict=True)
            for (key, value), (index, start) in pairs:
                if value.requires_grad:
                    tensors[f"{name}.model.{key}"], tensors[f"{name}.params0_values.{index}"] = value, start
    folder.mkdir()
    model.peft_config["default"].save_pretrained(folder)
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "linearized_adapter_model.safetensors")
    return logits(model)


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
def test_l_lora_checkpoints_compute_what_they_did(tmp_path, trained):
    expected = published_l_lora(tmp_path / "l", trained)
    stored = formats.open(tmp_path / "l")
    vector = formats.read(tmp_path / "l")
    assert (stored.kind, vector.scope) == ("L-LoRA checkpoint", "layer")
    assert any(name.endswith(".dA") for name in vector.deltas) == trained
    model = tiny_model("bert")
    linlora.linearize(model, point=vector)
    linlora.apply(model, vector)
    assert relative_error(logits(model), expected) < 1e-5


def test_a_plain_adapter_read_from_its_start_is_the_change_and_can_be_linearized(tmp_path):
    model = tiny_model("bert", trained=True)
    start = TaskVector.from_model(model)
    model.save_pretrained(tmp_path / "start")
    randomize(model, 8)
    model.save_pretrained(tmp_path / "end")
    change = TaskVector.from_model(model, point=start)
    for point in (start, tmp_path / "start", str(tmp_path / "start")):
        vector = formats.read(tmp_path / "end", point=point)
        assert vector.point_hash == start.point_hash
        assert (vector - change).norm() < 1e-6
    linearized = tiny_model("bert")
    linlora.linearize(linearized, point=vector.cast("layer"))
    linlora.apply(linearized, vector.cast("layer"))


def test_reading_leaves_tensors_in_the_file_until_they_are_asked_for(adapter, monkeypatch):
    asked = []
    original = linlora.storage.tensor_files.TensorFile.read
    monkeypatch.setattr(linlora.storage.tensor_files.TensorFile, "read", lambda f, n: asked.append(n) or original(f, n))
    stored = formats.open(adapter[0])
    assert not asked
    name = next(iter(stored.vector.deltas))
    assert stored.vector.deltas[name].dim() == 2
    assert len(asked) == 1


def test_what_stock_peft_loads_is_what_was_read(adapter):
    folder, expected = adapter
    stock = PeftModel.from_pretrained(tiny_base("bert"), folder)
    torch.testing.assert_close(logits(stock), expected)
    names = {name.rpartition(".")[0] for name in formats.read(folder).deltas}
    assert names == set(TaskVector.from_model(stock).scalings)


@pytest.mark.parametrize("there", ["linlora adapter", "L-LoRA checkpoint"])
def test_an_adapter_written_over_another_is_the_one_that_is_read(tmp_path, there):
    folder = tmp_path / "adapter"
    if there == "L-LoRA checkpoint":
        published_l_lora(folder, trained=True)
    else:
        model = tiny_model("bert", modules_to_save=["classifier"])
        linlora.linearize(model)
        linlora.export(model, folder)
    assert there in formats.open(folder).kind
    routed = linlora.routing.route(tiny_base("bert"), 2, rank=4, target_modules=["query"])
    randomize(routed, 3)
    linlora.routing.export_task(routed, folder, task_id=1)
    assert formats.open(folder).kind == "PEFT LoRA adapter"
    assert not (folder / "model_config" / "config.json").exists()
    vector, layer = formats.read(folder), routed.routed_layers[0]
    _, B = layer.adapter(linlora.routing.task_weights(routed, 1)[layer.layer_name])
    assert torch.equal(vector.deltas[f"{layer.layer_name}.dB"], B)
    linlora.export(vector, folder)
    assert formats.read(folder).scope == "weight"
