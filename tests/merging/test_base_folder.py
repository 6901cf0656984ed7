"""The folder of a base model, of anyone's making: what is read of it, and what goes with a merged model."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from linlora import CorruptFileError
from linlora.formats.checkpoint import Checkpoint
from linlora.merging import merge_files
from linlora.testing import tiny_base, tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def home(tmp_path):
    """A base, an adapter of it, and a model beside them that is none of the merge's business."""
    tiny_base("bert").save_pretrained(tmp_path / "base")
    tiny_base("bert", seed=7).save_pretrained(tmp_path / "precious")
    tiny_model("bert", trained=True).save_pretrained(tmp_path / "adapter")
    return tmp_path


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(home, message):
    before = everything(home)
    with pytest.raises(CorruptFileError, match=message):
        merge_files(home / "base", [home / "adapter"], home / "out")
    assert everything(home) == before


def merge(home):
    merged = merge_files(home / "base", [home / "adapter"], home / "out")
    return {str(path.relative_to(home / "out")) for path in everything(home / "out")}, set(merged.left_out)


@pytest.mark.parametrize(
    "name",
    [
        "../precious/model.safetensors", "sub/../../precious/model.safetensors", "{home}/precious/model.safetensors",
        "sub/model.safetensors", "..", "", ".", "config.json", "..\\precious\\model.safetensors", "C:model.safetensors",
        "a\0.safetensors", 3, None, ["model.safetensors"], {"a": 1}, "missing.safetensors",
    ],
    ids=str,
)  # fmt: skip
def test_a_shard_is_a_plain_name_in_the_folder(home, name):
    (home / "base" / "sub").mkdir()
    shutil.copy(home / "base" / "model.safetensors", home / "base" / "sub")
    name = name.replace("{home}", str(home)) if isinstance(name, str) else name
    keys = load_file(home / "base" / "model.safetensors")
    (home / "base" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    refused(home, "the shard .* of its index is missing|its index names the shard")


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "{" * 99]
)
def test_an_index_without_a_map(home, index):
    (home / "base" / INDEX).write_text(index)
    refused(home, INDEX)


def test_an_index_that_does_not_fit_its_shards(home):
    weights = load_file(home / "base" / "model.safetensors")
    key = next(iter(weights))
    save_file({key: weights[key]}, home / "base" / "more.safetensors")
    names = {**dict.fromkeys(weights, "model.safetensors"), "more": "more.safetensors"}
    (home / "base" / INDEX).write_text(json.dumps({"weight_map": names}))
    refused(home, rf"'{key}' is in model.safetensors and more.safetensors")
    save_file({"other": weights[key]}, home / "base" / "more.safetensors")
    refused(home, "'more' is in none of its shards")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX, "notes.txt"])
def test_a_link_out_of_the_folder_is_not_followed(home, name):
    (home / "precious" / "notes.txt").write_text("private")
    (home / "precious" / INDEX).write_text('{"weight_map": {"w": "model.safetensors"}}')
    (home / "base" / name).unlink(missing_ok=True)
    (home / "base" / name).symlink_to(home / "precious" / name)
    refused(home, f"{name}: a link to .*precious.*, outside of")


def test_links_in_the_folder_are_followed_and_linked_folders_are_named(home):
    os.rename(home / "base" / "model.safetensors", home / "base" / "weights.safetensors")
    (home / "base" / "model.safetensors").symlink_to("weights.safetensors")
    kept, left = merge(home)
    assert "model.safetensors" in kept
    assert left == {"weights.safetensors"}
    shutil.rmtree(home / "out")
    (home / "base" / "2_Dense").symlink_to(home / "precious")
    refused(home, "2_Dense: a link to a folder")


def test_the_hub_s_cache_is_links_to_its_blobs(home):
    snapshot = home / "models--a--b" / "snapshots" / "abc"
    (snapshot / "2_Dense").mkdir(parents=True)
    (home / "models--a--b" / "blobs").mkdir()
    save_file({"w": torch.ones(2)}, home / "base" / "dense.safetensors")
    for path, place in [*((p, p.name) for p in (home / "base").iterdir()), (None, "2_Dense/model.safetensors")]:
        source = path or home / "base" / "dense.safetensors"
        blob = home / "models--a--b" / "blobs" / str(hash(place))
        shutil.copy(source, blob)
        (snapshot / place).symlink_to(os.path.relpath(blob, (snapshot / place).parent))
    shutil.rmtree(home / "base")
    os.rename(home / "models--a--b", home / "cache")
    os.symlink(home / "cache" / "snapshots" / "abc", home / "base")
    kept, left = merge(home)
    assert {"config.json", "model.safetensors", "2_Dense/model.safetensors"} <= kept
    assert left == {"dense.safetensors"}
    assert not any(path.is_symlink() for path in (home / "out").rglob("*"))


def test_further_modules_go_along_and_what_is_of_the_base_alone_is_told(home):
    base = home / "base"
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}, {"idx": 2, "path": "3_Asym"}]
    (base / "modules.json").write_text(json.dumps(modules))
    files = {
        "2_Dense/model.safetensors": True, "2_Dense/config.json": True, "3_Asym/query/pytorch_model.bin": True,
        "3_Asym/weights.pt": True, "projector/model.safetensors": True, "projector/pytorch_model.bin": True,
        "onnx/model.onnx": False, "openvino/openvino_model.bin": False, "openvino/openvino_model.xml": True,
        "original/consolidated.00.pth": False, "pytorch_model.bin": False, "pytorch_model.bin.index.json": False,
        "consolidated.safetensors": False, "optimizer.pt": False, "tokenizer.json": True,
        "checkpoint-7/model.safetensors": False, "checkpoint-7/optimizer.pt": False,
        "adapter_config.json": False, "adapter_model.safetensors": False, "task_vector.safetensors": False,
        "lora/adapter_config.json": False, "lora/adapter_model.bin": False, "lora/README.md": True,
    }  # fmt: skip
    for name in files:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(b"{}")
    (base / "checkpoint-7" / "config.json").write_text('{"model_type": "bert"}')
    (base / ".git").mkdir()
    (base / ".git" / "model.safetensors").write_bytes(b"")
    kept, left = merge(home)
    assert left == {name for name, along in files.items() if not along}
    assert {name for name, along in files.items() if along} <= kept
    assert kept - files.keys() == {"config.json", "model.safetensors", "modules.json", "checkpoint-7/config.json"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "config.json: a JSON object is expected"),
        ("{'a'}", "config.json: not JSON"),
        ('{"a":' * 10_000, "config.json: .*nests too deep"),
        ('{"model_type": "bert", "num_hidden_layers": 1000000000}', "num_hidden_layers is beyond 10,000"),
    ],
    ids=["list", "no JSON", "deep", "layers"],
)
def test_a_configuration_that_cannot_be_meant(home, config, message):
    (home / "base" / "config.json").write_text(config)
    refused(home, message)


def test_a_configuration_that_its_model_does_not_take_is_no_help_and_no_harm(home):
    config = home / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": -3}))
    assert Checkpoint(home / "base").skeleton is None
    assert merge(home)[1] == set()
