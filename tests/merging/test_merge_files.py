"""Merging from file to file: the same bits as merging in memory, and nothing half-written."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

import linlora
from linlora import TaskVector, formats
from linlora.formats.checkpoint import WrongBaseError
from linlora.formats.export import export_stored
from linlora.layers import weights
from linlora.merging import merge_files
from linlora.testing import randomize, relative_error, tiny_base, tiny_batch, tiny_model


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def save_base(tmp_path, architecture="bert", dtype=torch.float32, **options):
    tiny_base(architecture).to(dtype).save_pretrained(tmp_path / "base", **options)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


def linearized(architecture="bert", trained=True, seed=5, dtype=torch.float32):
    model = tiny_model(architecture, trained)
    model.get_base_model().to(dtype)
    linlora.linearize(model)
    randomize(model, seed, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    return model


def everything(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5", "vit"])
def test_the_folder_is_the_model_merged_in_memory_bit_for_bit(tmp_path, architecture, trained):
    base = save_base(tmp_path, architecture, torch.bfloat16)
    model = linearized(architecture, trained, dtype=torch.bfloat16)
    TaskVector.from_model(model).save(tmp_path / "v.safetensors")
    merged = merge_files(base, [tmp_path / "v.safetensors"], tmp_path / "out")
    expected = linlora.merge(model)
    assert merged.folded == len(TaskVector.load(tmp_path / "v.safetensors").scalings)
    loaded = type(expected).from_pretrained(tmp_path / "out", dtype="auto").eval()
    state = expected.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    batch = tiny_batch(architecture)  # transformers keeps some buffers and layers wider than bfloat16
    assert relative_error(loaded(**batch)[0], expected(**batch)[0]) < 5e-2


def test_shards_metadata_and_the_files_beside_are_kept(tmp_path, base):
    sharded = tmp_path / "sharded"
    tiny_base("bert").save_pretrained(sharded, max_shard_size="20KB")
    (sharded / "tokenizer.json").write_text("{}")
    (sharded / "pytorch_model.bin").write_bytes(b"stale")
    (sharded / "onnx").mkdir()
    (sharded / "onnx" / "model.onnx").write_bytes(b"stale")
    (sharded / "1_Pooling").mkdir()
    (sharded / "1_Pooling" / "config.json").write_text("{}")
    linlora.export(linearized(), tmp_path / "adapter")
    merge_files(sharded, [tmp_path / "adapter"], tmp_path / "out")
    merge_files(base, [tmp_path / "adapter"], tmp_path / "single")
    out, single = everything(tmp_path / "out"), everything(tmp_path / "single")
    assert out.keys() == single.keys()
    assert all(torch.equal(out[name], single[name]) for name in out)
    names = {str(path) for path in files_of(tmp_path / "out")}
    assert names == {str(path) for path in files_of(sharded)} - {"pytorch_model.bin", "onnx/model.onnx"}
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_several_adapters_of_any_format_are_summed(tmp_path, base):
    vector = TaskVector.from_model(linearized(trained=False, seed=1))
    vector.save(tmp_path / "v.safetensors")
    plain = tiny_model("bert", trained=True, seed=3, target_modules=["query"], r=2)
    plain.save_pretrained(tmp_path / "p")
    merge_files(base, [tmp_path / "v.safetensors", tmp_path / "p"], tmp_path / "out")
    start, end = everything(base), everything(tmp_path / "out")
    layer = "bert.encoder.layer.1.attention.self.query"
    A, B = (plain.get_submodule(f"base_model.model.{layer}.lora_{k}.default").weight for k in "AB")
    first = vector.scalings[layer] * vector.deltas[f"{layer}.dB"] @ vector.point[f"{layer}.A0"]
    torch.testing.assert_close(end[f"{layer}.weight"], start[f"{layer}.weight"] + first + 4.0 * B @ A)


def test_a_head_trained_beside_the_adapter_replaces_the_base_s(tmp_path, base):
    model = tiny_model("bert", trained=True, modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in model.base_model.model.classifier.modules_to_save["default"].parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "a")
    merged = merge_files(base, [tmp_path / "a"], tmp_path / "out")
    assert merged.replaced == 2
    loaded = type(tiny_base("bert")).from_pretrained(tmp_path / "out").eval()
    batch = tiny_batch("bert")
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'classifier.*' was trained beside .*, and a model has one; merge one"):
        merge_files(base, [tmp_path / "a", tmp_path / "a"], tmp_path / "twice")


def test_an_adapted_output_embedding_is_added_to_the_weight_peft_saves_with_it(tmp_path):
    def untied():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig.from_dict({**tiny_base("llama").config.to_dict(), "tie_word_embeddings": False})
        )

    untied().save_pretrained(tmp_path / "base")
    model = get_peft_model(untied(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    randomize(model, 3)
    model.save_pretrained(tmp_path / "a")
    assert list(formats.open(tmp_path / "a").extras) == ["lm_head.weight"]
    merge_files(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    expected = linlora.merge(model).state_dict()
    torch.testing.assert_close(everything(tmp_path / "out"), dict(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("change", ["prefix in the base", "prefix in the adapter"])
def test_a_prefix_of_the_names_is_seen_through(tmp_path, base, change):
    if change == "prefix in the base":  # the adapter is of model.bert, the checkpoint of the whole model
        inner = tiny_base("bert").bert
        model = PeftModel(inner, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"]))
        randomize(model, 3)
        model.save_pretrained(tmp_path / "a")
        expected = {f"bert.{name}": tensor for name, tensor in linlora.merge(model).state_dict().items()}
        merge_files(base, [tmp_path / "a"], tmp_path / "out")
        out = everything(tmp_path / "out")
        torch.testing.assert_close({name: out[name] for name in expected}, expected)
    else:
        TaskVector.from_model(linearized()).save(tmp_path / "v.safetensors")
        tiny_base("bert").bert.save_pretrained(tmp_path / "inner")
        merge_files(tmp_path / "inner", [tmp_path / "v.safetensors"], tmp_path / "out")
        merge_files(base, [tmp_path / "v.safetensors"], tmp_path / "whole")
        whole = everything(tmp_path / "whole")
        assert all(torch.equal(t, whole[f"bert.{n}"]) for n, t in everything(tmp_path / "out").items())


def test_weights_larger_than_a_block_are_merged_block_by_block(tmp_path, base, monkeypatch):
    TaskVector.from_model(linearized()).save(tmp_path / "v.safetensors")
    merge_files(base, [tmp_path / "v.safetensors"], tmp_path / "one")
    monkeypatch.setattr(weights, "BLOCK", 100)
    merge_files(base, [tmp_path / "v.safetensors"], tmp_path / "many")
    one, many = everything(tmp_path / "one"), everything(tmp_path / "many")
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-7)


class TestRefusals:
    @pytest.fixture
    def vector(self, tmp_path):
        TaskVector.from_model(linearized()).save(tmp_path / "v.safetensors")
        return tmp_path / "v.safetensors"

    def refused(self, tmp_path, base, adapter, error, message):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error, match=message):
            merge_files(base, [adapter], tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before

    def test_another_model(self, tmp_path, vector):
        llama = save_base(tmp_path, "llama")
        self.refused(
            tmp_path, llama, vector, WrongBaseError, r"no weight for 11 of 11 adapted layers, the first .*Is it"
        )

    def test_another_size(self, tmp_path, vector):
        config = tiny_base("bert").config
        config.intermediate_size = 64
        type(tiny_base("bert"))(config).save_pretrained(tmp_path / "base")
        message = r"layer 'bert.*' of the adapter is .*, its weight in .* not the model the adapter was trained on"
        self.refused(tmp_path, tmp_path / "base", vector, WrongBaseError, message)

    def test_a_tied_head(self, tmp_path):
        base = save_base(tmp_path, "gpt2")
        model = tiny_model("gpt2", trained=True, target_modules=["c_attn", "lm_head"])
        linlora.accelerate(model)
        model.save_pretrained(tmp_path / "a")
        self.refused(tmp_path, base, tmp_path / "a", WrongBaseError, "'lm_head'.*It shares the weight of the embedding")

    def test_a_head_the_base_has_not(self, tmp_path):
        tiny_base("bert").bert.save_pretrained(tmp_path / "inner")
        tiny_model("bert", modules_to_save=["classifier"]).save_pretrained(tmp_path / "a")
        message = r"'classifier.*' .* was trained beside the adapter .* has no such tensor"
        self.refused(tmp_path, tmp_path / "inner", tmp_path / "a", WrongBaseError, message)

    def test_a_head_of_more_classes_than_that_of_the_base(self, tmp_path):
        tiny_base("bert").save_pretrained(tmp_path / "base")
        config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
        get_peft_model(tiny_base("bert", num_labels=5), config).save_pretrained(tmp_path / "a")
        message = r"'classifier.*' \(5,.*\) was trained beside the adapter .* has one of \(3,.*linlora\.merge\(model\)"
        self.refused(tmp_path, tmp_path / "base", tmp_path / "a", WrongBaseError, message)

    def test_model_scope(self, tmp_path, base):
        model = tiny_model("bert")
        linlora.linearize(model, scope="model")
        TaskVector.from_model(model).save(tmp_path / "m.safetensors")
        self.refused(tmp_path, base, tmp_path / "m.safetensors", ValueError, r"linearized as a whole.*cast\('layer'\)")

    def test_a_vector_without_its_point(self, tmp_path, base):
        TaskVector.from_model(linearized(trained=False)).save(tmp_path / "h.safetensors", include_point=False)
        self.refused(tmp_path, base, tmp_path / "h.safetensors", ValueError, "saved without its point")

    def test_a_quantized_base(self, tmp_path, base, vector):
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes"}
        (base / "config.json").write_text(json.dumps(config))
        self.refused(tmp_path, base, vector, ValueError, r"quantized \(bitsandbytes\).*Serve base and adapter unmerged")

    def test_integer_weights(self, tmp_path, base, vector):
        tensors = everything(base)
        name = "bert.encoder.layer.0.attention.self.query.weight"
        save_file({**tensors, name: tensors[name].to(torch.int8)}, base / "model.safetensors")
        self.refused(tmp_path, base, vector, ValueError, rf"'{name}' is torch.int8: a quantized weight")

    def test_an_overflow(self, tmp_path, vector):
        base = save_base(tmp_path, dtype=torch.float16)
        huge = 1e6 * TaskVector.load(vector)
        huge.save(vector)
        self.refused(tmp_path, base, vector, ValueError, "W \\+ ΔW is not finite in torch.float16")

    def test_a_head_that_overflows(self, tmp_path):
        base = save_base(tmp_path, dtype=torch.float16)
        model = tiny_model("bert", modules_to_save=["classifier"])
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.fill_(1e6)
        model.save_pretrained(tmp_path / "a")
        message = "'classifier.weight', trained beside .*, is not finite in torch.float16"
        self.refused(tmp_path, base, tmp_path / "a", ValueError, message)

    def test_a_weight_that_one_adapter_changes_and_another_replaces(self, tmp_path, base):
        tiny_model("bert", target_modules=["query", "classifier"]).save_pretrained(tmp_path / "a")
        model = tiny_model("bert", modules_to_save=["classifier"])
        model.base_model.model.classifier.modules_to_save["default"].weight.data.normal_()
        model.save_pretrained(tmp_path / "b")
        with pytest.raises(
            ValueError, match=r"'classifier.weight' was trained as a whole beside .*b, and .*a changes it"
        ):
            merge_files(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")

    @pytest.mark.parametrize("scope", ["lora", "layer"])
    def test_a_vector_of_base_weights_that_its_start_changed(self, tmp_path, base, scope):
        model = tiny_model("bert", init_lora_weights="pissa", target_modules=["query"])
        start = TaskVector.from_model(model)
        if scope == "layer":
            linlora.linearize(model)
        vector = TaskVector.from_model(model, point=start if scope == "lora" else None)
        vector.save(tmp_path / "v.safetensors")
        vector, message = TaskVector.load(tmp_path / "v.safetensors"), "init_lora_weights 'pissa' changes the base"
        self.refused(tmp_path, base, tmp_path / "v.safetensors", ValueError, message)
        for leave in (lambda: linlora.export(vector, tmp_path / "b"), lambda: vector.cast("weight")):
            with pytest.raises(ValueError, match=message):
                leave()
        for enter in (
            lambda of: linlora.apply(of, vector),
            lambda of: linlora.linearize(of, point=vector),
            lambda of: linlora.routing.from_vectors(of, [vector]),
        ):
            with pytest.raises(linlora.DifferentPointError, match="the vector are those that pissa changed"):
                enter(tiny_model("bert", target_modules=["query"]))
        linlora.apply(model, 2.0 * vector)
        with pytest.raises(linlora.DifferentPointError, match="those of the model those that pissa changed"):
            linlora.apply(model, TaskVector.from_model(tiny_model("bert", target_modules=["query"])))

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_an_adapter_of_base_weights_that_its_start_changed(self, tmp_path, base, init):
        def model():
            return get_peft_model(tiny_base("bert"), LoraConfig(target_modules=["query"], init_lora_weights=init))

        model().save_pretrained(tmp_path / "a")
        message = f"init_lora_weights '{init}' changes the base weights"
        self.refused(tmp_path, base, tmp_path / "a", ValueError, message)
        with pytest.raises(ValueError, match=message):
            export_stored(formats.open(tmp_path / "a"), tmp_path / "b")
        linearized = model()
        linlora.linearize(linearized)
        with pytest.raises(ValueError, match=message):
            linlora.export(linearized, tmp_path / "b")
        randomize(linearized, 3, ("lora_dA", "lora_dB"))
        with pytest.warns(UserWarning, match=f"started by '{init}', which changed the base weights"):
            linearized.save_pretrained(tmp_path / "c")
        self.refused(tmp_path, base, tmp_path / "c", ValueError, message)
        batch, resumed = tiny_batch("bert"), model()
        linlora.linearize(resumed)
        resumed.load_adapter(tmp_path / "c", "default")
        torch.testing.assert_close(resumed(**batch).logits, linearized(**batch).logits)

    def test_an_adapter_of_repeated_layers(self, tmp_path, base):
        tiny_model("bert").save_pretrained(tmp_path / "a")
        file = tmp_path / "a" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": [[0, 2], [1, 2]]}))
        self.refused(tmp_path, base, tmp_path / "a", ValueError, "layer_replication is set: its layers are numbered")

    def test_no_adapter(self, tmp_path, base):
        with pytest.raises(ValueError, match="no adapters were given"):
            merge_files(base, [], tmp_path / "out")

    def test_pickled_missing_and_damaged_bases(self, tmp_path, base, vector):
        whole = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes(whole[:-5])
        self.refused(tmp_path, base, vector, linlora.CorruptFileError, "not a whole safetensors file")
        (base / "model.safetensors").unlink()
        self.refused(tmp_path, base, vector, FileNotFoundError, "no model in this folder")
        (base / "pytorch_model.bin").write_bytes(b"")
        self.refused(tmp_path, base, vector, ValueError, "the weights are pickles; load the model and save_pretrained")
        self.refused(
            tmp_path, tmp_path / "nothing", vector, FileNotFoundError, "no such folder; a model of the Hugging"
        )
        index = {"weight_map": {"w": "model-1.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(
            tmp_path, base, vector, linlora.CorruptFileError, r"the shard model-1.safetensors of its index is missing"
        )

    def test_a_folder_that_exists(self, tmp_path, base, vector, monkeypatch):
        (tmp_path / "out").mkdir()
        merge_files(base, [vector], tmp_path / "out")  # empty: fine
        self.refused(tmp_path, base, vector, FileExistsError, "exists already; choose another folder")
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        merge_files(base, [vector], tmp_path / "link")
        assert everything(tmp_path / "empty")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")  # to replace it would leave the shell in a folder that is gone
        with pytest.raises(FileExistsError):
            merge_files(base, [vector], ".")

    def test_an_interrupted_merge_leaves_nothing(self, tmp_path, base, vector, monkeypatch):
        import linlora.merging.plan

        calls = []

        def interrupted(*arguments):
            calls.append(arguments)
            if len(calls) == 5:
                raise KeyboardInterrupt("stopped")
            return weights.folded(*arguments)

        monkeypatch.setattr(linlora.merging.plan, "folded", interrupted)
        self.refused(tmp_path, base, vector, KeyboardInterrupt, "stopped")


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("classes", [0, 3, 4], ids=["no head", "another head", "a head of that size"])
def test_a_head_is_added_or_put_in_the_place_of_another_with_its_class_names(tmp_path, classes, shards):
    names = ["red", "green", "blue", "grey"]
    config = tiny_base("bert").config
    if classes:
        config.num_labels = classes
        BertForSequenceClassification(config).to(torch.bfloat16).save_pretrained(tmp_path / "base", **shards)
    else:
        BertModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "base", **shards)
    base = BertForSequenceClassification.from_pretrained(
        tmp_path / "base", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    linlora.linearize(model)
    randomize(model, 3, ("lora_B", "modules_to_save"))
    linlora.export(model, tmp_path / "adapter")
    merged = merge_files(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    loaded, info = BertForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert [loaded.config.id2label[i] for i in range(4)] == names
    expected = linlora.merge(model).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert merged.replaced == 2


def test_a_vocabulary_that_grew_is_not_taken_for_a_head(tmp_path):
    base = save_base(tmp_path, "llama")
    grown = tiny_base("llama")
    grown.resize_token_embeddings(grown.config.vocab_size + 8)
    model = get_peft_model(grown, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    linlora.linearize(model)
    linlora.export(model, tmp_path / "adapter")
    with pytest.raises(WrongBaseError, match="to replace"):
        merge_files(base, [tmp_path / "adapter"], tmp_path / "out")


def test_a_base_folder_of_two_models_is_refused(tmp_path):
    base = save_base(tmp_path)
    tiny_base("bert").save_pretrained(base, max_shard_size="20KB")  # leaves model.safetensors, which transformers loads
    tiny_model("bert", trained=True).save_pretrained(tmp_path / "adapter")
    with pytest.raises(linlora.CorruptFileError, match=r"model\.safetensors and the shards .* are two models"):
        merge_files(base, [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_whose_shards_are_gone_is_of_no_model(tmp_path):
    """transformers leaves it there when it saves a model in one file over shards, and loads that file."""
    base = save_base(tmp_path, max_shard_size="20KB")
    tiny_base("bert").save_pretrained(base)
    assert (base / "model.safetensors.index.json").exists()
    assert (base / "model.safetensors").exists()
    tiny_model("bert", trained=True).save_pretrained(tmp_path / "adapter")
    merge_files(base, [tmp_path / "adapter"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    BertForSequenceClassification.from_pretrained(tmp_path / "out")


def test_a_head_of_another_size_in_an_early_shard_is_written_once(tmp_path):
    base = save_base(tmp_path)
    tensors = everything(base)
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("classifier")}
    shards = {"a.safetensors": head, "b.safetensors": {n: t for n, t in tensors.items() if n not in head}}
    (base / "model.safetensors").unlink()
    for file, content in shards.items():
        save_file(content, base / file, {"format": "pt"})
    weight_map = {name: file for file, content in shards.items() for name in content}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = get_peft_model(
        tiny_base("bert", num_labels=5), LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    )
    linlora.export(model, tmp_path / "adapter")
    merge_files(base, [tmp_path / "adapter"], tmp_path / "out")
    assert {file: set(load_file(tmp_path / "out" / file)) for file in shards} == {f: set(c) for f, c in shards.items()}
    assert BertForSequenceClassification.from_pretrained(tmp_path / "out").classifier.weight.shape[0] == 5
