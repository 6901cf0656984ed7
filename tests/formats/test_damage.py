"""Files damaged at random are refused by their names or read as they were: no other error, no hang."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import linlora
import linlora.merging
from linlora import TaskVector, formats
from linlora.testing import tiny_base, tiny_model

WORDS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b",",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"true",
    b"9" * 5000,
    b"[" * 3000,
    b"\xff",
    b"\0",
]
VALUES = [
    None, True, False, 0, -1, 4, 1e308, float("nan"), float("inf"), 10**400, "x", "", [], {}, [1], {"query": 16},
    {"(": 1}, {"a": "b"}, [[]], "4", {"x": {}},
]  # fmt: skip


def content(path):
    """What is read of an adapter, every bit."""
    stored = formats.open(path)
    vector = stored.vector.loaded()
    tensors = {**vector.deltas, **(vector.point or {}), **{f"beside {name}": t for name, t in stored.extras.items()}}
    bits = {name: (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in tensors.items()}
    return vector.scope, vector.scalings, vector.point_hash, bits


def damaged(raw, chance):
    raw = bytearray(raw)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        place = chance.randrange(max(1, min(len(raw), 3000) if chance.random() < 0.6 else len(raw)))
        match chance.randrange(5):
            case 0:
                raw[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                del raw[place : place + chance.choice([1, 2, 8, 100])]
            case 2:
                raw[place:place] = chance.choice(WORDS)
            case 3:
                del raw[place:]
            case 4:
                raw[place:place] = raw[: chance.choice([1, 10, 50])]
    return bytes(raw)


def reconfigured(raw, chance):
    config = json.loads(raw)
    return json.dumps({**config, chance.choice(list(config)): chance.choice(VALUES)}).encode()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Of every kind that has checksums: what is read of the damaged is what was there."""
    root = tmp_path_factory.mktemp("damage")
    model = tiny_model("bert", trained=True, target_modules=["query"], modules_to_save=["classifier"])
    model.save_pretrained(root / "pickle")
    torch.save(load_file(root / "pickle" / "adapter_model.safetensors"), root / "pickle" / "adapter_model.bin")
    (root / "pickle" / "adapter_model.safetensors").unlink()
    shutil.copytree(root / "pickle", root / "PEFT")
    tensors = torch.load(root / "PEFT" / "adapter_model.bin")
    (root / "PEFT" / "adapter_model.bin").unlink()
    save_file(tensors, root / "PEFT" / "adapter_model.safetensors")
    linlora.linearize(model)
    linlora.export(model, root / "export")
    (root / "vector").mkdir()
    TaskVector.from_model(model).save(root / "vector" / "task_vector.safetensors")
    return root


@pytest.mark.parametrize("kind", ["vector", "export", "PEFT", "pickle"])
def test_a_damaged_adapter_is_refused_or_read_as_it_was(adapters, tmp_path, kind):
    expected, chance = content(adapters / kind), random.Random(kind)
    refusals = []
    for _ in range(200):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(adapters / kind, tmp_path / "a")
        file = chance.choice(sorted((tmp_path / "a").glob("*.*")))
        raw = file.read_bytes()
        is_config = file.suffix == ".json"
        file.write_bytes((reconfigured if is_config and chance.random() < 0.5 else damaged)(raw, chance))
        try:
            found = content(tmp_path / "a")
        except (ValueError, FileNotFoundError) as error:
            refusals.append(str(error))
            continue
        checked = kind == "vector" or (kind == "export" and file.name == "task_vector.safetensors")
        if checked or (kind == "pickle" and not is_config):
            assert found == expected
    assert refusals
    assert all(str(tmp_path / "a") in message for message in refusals)


def test_a_damaged_base_is_refused_or_merged(tmp_path):
    tiny_base("bert").save_pretrained(tmp_path / "base", max_shard_size="30KB")
    tiny_model("bert", trained=True, target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    chance = random.Random(0)
    for _ in range(60):
        shutil.copytree(tmp_path / "base", tmp_path / "b")
        file = chance.choice(sorted((tmp_path / "b").iterdir()))
        file.write_bytes(damaged(file.read_bytes(), chance))
        try:
            linlora.merging.merge_files(tmp_path / "b", [tmp_path / "adapter"], tmp_path / "out")
        except (ValueError, FileNotFoundError):
            assert not (tmp_path / "out").exists()
        assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter", "b", "out"}
        shutil.rmtree(tmp_path / "b")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("tensor", ["expanded", "sparse", "under a number", "compressed"])
def test_tensors_in_pickles_that_are_not_all_there(adapters, tmp_path, tensor):
    import zipfile

    shutil.copy(adapters / "pickle" / "adapter_config.json", tmp_path)
    file = tmp_path / "adapter_model.bin"
    contents = {
        "expanded": {"w": torch.ones(1).expand(10**12)},
        "sparse": {"w": torch.eye(3).to_sparse()},
        "under a number": {7: torch.ones(3)},
        "compressed": {"w": torch.zeros(10**5)},
    }
    torch.save(contents[tensor], file)
    if tensor == "compressed":
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, raw in members.items():
                archive.writestr(name, raw)
    with pytest.raises(linlora.CorruptFileError, match=r"adapter_model\.bin: "):
        formats.read(tmp_path)
