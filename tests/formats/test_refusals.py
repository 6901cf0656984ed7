"""Files that are damaged, foreign or not adapters: each a specific error."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import linlora
from linlora import CorruptFileError, DifferentPointError, TaskVector, formats
from linlora.testing import tiny_base, tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("bert", trained=True).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def reconfigure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), r"layer 'bert.*query' has no lora_B"),
        (lambda t: t.pop(f"{QUERY}.lora_A.weight"), r"layer 'bert.*query' has no lora_A"),
        (lambda t: t.update({f"{QUERY}.lora_A.default.weight": torch.ones(4, 32)}), "lora_A of layer .* is there tw"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(3, 32)}), r"is \(3, 32\) and lora_B \(32, 4\)"),
        (lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(32)}), "is of DoRA; linlora reads LoRA of"),
        (lambda t: t.update({"x.lora_embedding_A": torch.ones(4, 9)}), "is of a LoRA of an embedding"),
        (lambda t: t.update({f"{QUERY}.lora_B.bias": torch.ones(32)}), "is of a LoRA with bias"),
        (lambda t: [t.pop(n) for n in list(t)] and t.update(w=torch.ones(2)), "no LoRA factor in it; it holds w"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CorruptFileError, match=message):
        formats.read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, r"gives layer 'bert.*' the rank 8, its tensors have rank 4; the two files are"),
        ({"r": 0}, r"r is 0; a rank of 1 or more"),
        ({"r": True}, r"r is True; a rank of 1 or more"),
        ({"r": "4"}, r"r is '4'; a rank of 1 or more"),
        ({"lora_alpha": float("nan")}, r"lora_alpha is nan; a number of ordinary size"),
        ({"lora_alpha": float("inf")}, r"lora_alpha is inf; a number"),
        ({"lora_alpha": 10**400}, r"lora_alpha is 10+\.\.\.0+; a number"),
        ({"lora_alpha": "8"}, r"lora_alpha is '8'; a number"),
        ({"lora_alpha": True}, r"lora_alpha is True; a number"),
        ({"use_rslora": "no"}, r"use_rslora is 'no'; true or false"),
        ({"alpha_pattern": "abc"}, r"alpha_pattern is 'abc'; a table of numbers"),
        ({"alpha_pattern": {"query": float("nan")}}, r"alpha_pattern is .*; a table of numbers"),
        ({"alpha_pattern": {"(": 8}}, r"alpha_pattern: '\(' is no regular expression"),
        ({"rank_pattern": {"query": False}}, r"rank_pattern is .*; a table of ranks"),
        ({"rank_pattern": {"(" * 5000: 4}}, r"rank_pattern: '\(+' is no regular expression"),
        ({"base_model_name_or_path": ["a"]}, r"base_model_name_or_path is \['a'\]; a name"),
        ({"peft_type": "IA3"}, r"adapter_config.json: a 'IA3' adapter; linlora reads LoRA"),
        ({"use_dora": True}, "use_dora is set: DoRA scales the rows"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(folder, changes, message):
    reconfigure(folder, **changes)
    with pytest.raises(CorruptFileError, match=message):
        formats.read(folder)


def test_a_config_that_is_missing_or_broken(folder):
    (folder / "adapter_config.json").write_text("{'r': 4}")
    with pytest.raises(CorruptFileError, match=r"adapter_config.json: not JSON"):
        formats.read(folder)
    (folder / "adapter_config.json").write_text('{"r": 4, "r": 8}')
    with pytest.raises(CorruptFileError, match=r"adapter_config.json: not JSON \(the key 'r' is there twice\)"):
        formats.read(folder)
    (folder / "adapter_config.json").write_text('{"r":' * 100_000)
    with pytest.raises(CorruptFileError, match=r"adapter_config.json: .*it nests too deep"):
        formats.read(folder)
    (folder / "adapter_config.json").write_text("[4]")
    with pytest.raises(CorruptFileError, match=r"adapter_config.json: a JSON object is expected, got a list"):
        formats.read(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CorruptFileError, match=r"no adapter_config.json, so the scaling of the adapter is unknown"):
        formats.read(folder)
    with pytest.raises(CorruptFileError, match=r"no adapter_config.json, so the scaling"):
        formats.read(folder / "adapter_model.safetensors")


def test_truncated_and_not_finite(folder):
    rewrite(folder, lambda t: t[f"{QUERY}.lora_A.weight"].__setitem__((0, 0), float("inf")))
    with pytest.raises(CorruptFileError, match=rf"tensor '{QUERY}.lora_A.weight' holds NaN or infinity"):
        formats.read(folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptFileError, match="not a whole safetensors file"):
        formats.read(folder)


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"w": Harmful()}, protocol=2), "could run code in it, so it is refused"),
        (b"not a pickle at all", "pickle that holds more than tensors, or a broken one|not a whole PyTorch file"),
        (b"", "not a whole PyTorch file"),
    ],
    ids=["harmful", "garbage", "empty"],
)
def test_pickles_are_never_run(folder, content, message):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(CorruptFileError, match=message):
        formats.read(folder)


def test_pickles_of_something_else(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"epoch": 3}, folder / "adapter_model.bin")
    with pytest.raises(CorruptFileError, match="a dictionary of tensors is expected"):
        formats.read(folder)
    torch.save({"w": torch.tensor([float("nan")])}, folder / "adapter_model.bin")
    with pytest.raises(CorruptFileError, match="tensor 'w' holds NaN or infinity"):
        formats.read(folder)
    torch.save({"w": torch.randn(5000)}, folder / "adapter_model.bin")
    whole = (folder / "adapter_model.bin").read_bytes()
    (folder / "adapter_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match="not a whole PyTorch file"):
        formats.read(folder)


class TestWhatIsNoAdapter:
    def test_nothing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file or folder; an adapter of the Hugging Face hub"):
            formats.read("someone/some-adapter")

    def test_an_empty_folder_and_one_whose_subfolder_is_meant(self, tmp_path, folder):
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"no adapter in this folder \(none of task_vector.safetensors, "):
            formats.read(tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match=rf"there are adapters in {folder}"):
            formats.read(tmp_path)

    def test_a_model(self, tmp_path):
        tiny_base("bert").save_pretrained(tmp_path)
        with pytest.raises(CorruptFileError, match="a whole model, where an adapter is expected"):
            formats.read(tmp_path)
        with pytest.raises(CorruptFileError, match=r"a safetensors file of format 'pt' with \d+ tensors"):
            formats.read(tmp_path / "model.safetensors")

    def test_factors_without_their_config(self, tmp_path):
        save_file({f"{QUERY}.lora_A.weight": torch.ones(4, 32)}, tmp_path / "renamed.safetensors")
        with pytest.raises(CorruptFileError, match="LoRA factors without their adapter_config"):
            formats.read(tmp_path / "renamed.safetensors")

    def test_another_kind_of_file(self, tmp_path):
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(CorruptFileError, match=r"notes.txt: not an adapter; a .safetensors file or the folder"):
            formats.read(tmp_path / "notes.txt")


class TestLLora:
    @pytest.fixture
    def layout(self, folder):
        (folder / "adapter_model.safetensors").unlink()
        layer = "base_model.model.q"
        tensors = {
            f"{layer}.model.lora_A.default.weight": torch.ones(4, 8),
            f"{layer}.model.lora_B.default.weight": torch.ones(6, 4),
            f"{layer}.params0_values.2": torch.ones(4, 8),
            f"{layer}.params0_values.3": torch.zeros(6, 4),
        }
        reconfigure(folder, r=4)
        return folder / "linearized_adapter_model.safetensors", tensors

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("base_model.model.q.params0_values.2"), "2 trained factors and 1 of its starting point"),
            (lambda t: t.update({"base_model.model.q.params0_values.2": torch.ones(4, 7)}), "the shapes of A, B, A0,"),
            (lambda t: t.update({"base_model.model.q.bias": torch.ones(4)}), "'base_model.model.q.bias' is neither a"),
        ],
    )  # fmt: skip
    def test_what_is_missing_or_foreign(self, layout, change, message):
        path, tensors = layout
        save_file(tensors, path)
        assert list(formats.read(path).deltas) == ["q.dB"]
        change(tensors)
        save_file(tensors, path)
        with pytest.raises(CorruptFileError, match=message):
            formats.read(path)


def test_a_start_that_is_another_adapter_s(folder, tmp_path):
    other = tiny_model("bert", target_modules=["query"])
    with pytest.raises(DifferentPointError, match="cover different layers"):
        formats.read(folder, point=TaskVector.from_model(other))
    linlora.linearize(other)
    with pytest.raises(DifferentPointError, match="from a start of scope 'layer': that is for two plain"):
        formats.read(folder, point=TaskVector.from_model(other))
