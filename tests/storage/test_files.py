"""Files are whole or absent."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from linlora.storage import files, tensor_files
from linlora.storage.run_directory import LOCK_FILE, accept_directory, staged


def test_text_is_replaced_in_one_step(tmp_path):
    files.write_text(tmp_path / "new" / "a.json", "one")
    files.write_text(tmp_path / "new" / "a.json", "two")
    assert (tmp_path / "new" / "a.json").read_text() == "two"
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_tensors_round_trip_with_strides_and_metadata(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).t()
    tensor_files.save_tensors(tmp_path / "t.safetensors", {"t": tensor}, {"key": "value"})
    tensors, metadata = tensor_files.load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(tensors["t"], tensor)
    assert metadata == {"key": "value"}


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(AttributeError):
        tensor_files.save_tensors(tmp_path / "t.safetensors", {"t": "not a tensor"}, {})
    assert not list(tmp_path.iterdir())


def test_text_that_finds_no_place_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        files.write_text(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_would_be_refused_on_reading_is_not_written(tmp_path, value):
    path = tmp_path / "t.safetensors"
    tensor_files.save_tensors(path, {"t": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="tensor 'v' holds NaN or infinity; nothing was written"):
        tensor_files.save_tensors(path, {"t": torch.zeros(2), "v": torch.tensor([1.0, value])}, {})
    assert tensor_files.load_tensors(path)[0]["t"].tolist() == [1.0, 1.0]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_and_folders_have_the_permissions_of_the_user_s_others(tmp_path, mask):
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "text", "private")
        tensor_files.save_tensors(tmp_path / "tensors", {"t": torch.ones(2)}, {})
        with staged(tmp_path / "folder") as folder:
            (folder / "file").touch()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"text": 0o666 & ~mask, "tensors": 0o666 & ~mask, "folder": 0o777 & ~mask}


def test_tensors_of_several_dtypes_start_aligned(tmp_path):
    """An odd number of bfloat16 before a float64 would leave that at an address it cannot be read from."""
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(1)}
    tensor_files.save_tensors(tmp_path / "t.safetensors", tensors, {})
    with tensor_files.TensorFile(tmp_path / "t.safetensors") as file:
        assert all(file.entries[name].start % tensor.element_size() == 0 for name, tensor in tensors.items())
    loaded, _ = tensor_files.load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_bytes_are_copied_also_where_the_kernel_cannot(tmp_path, monkeypatch):
    tensor_files.save_tensors(tmp_path / "t.safetensors", {"t": torch.randn(1000)}, {})
    monkeypatch.setattr(tensor_files, "_CHUNK", 300)
    monkeypatch.delattr(tensor_files.os, "copy_file_range", raising=False)
    with tensor_files.TensorFile(tmp_path / "t.safetensors") as file, open(tmp_path / "copy", "wb", buffering=0) as out:
        file.copy(0, file.size, out.fileno())
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "t.safetensors").read_bytes()


def test_bytes_are_copied_while_another_thread_reads(tmp_path, monkeypatch):
    class Interrupted:
        """A file whose position another thread may move as soon as it is set."""

        def __init__(self, file):
            self.file = file

        def seek(self, position):
            self.file.seek(position)
            time.sleep(1e-3)

        def __getattr__(self, name):
            return getattr(self.file, name)

    tensor_files.save_tensors(tmp_path / "t.safetensors", {"t": torch.arange(2**10).reshape(8, -1)}, {})
    monkeypatch.setattr(tensor_files, "_CHUNK", 512)
    monkeypatch.delattr(tensor_files.os, "copy_file_range", raising=False)
    file = tensor_files.TensorFile(tmp_path / "t.safetensors")
    monkeypatch.setattr(file, "_file", Interrupted(file._file))
    with open(tmp_path / "copy", "wb") as out, ThreadPoolExecutor(1) as thread:
        copying = thread.submit(file.copy, 0, file.size, out.fileno())
        while not copying.done():
            assert file.read_rows("t", slice(1, 2))[0, 0] == 128
        copying.result()
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "t.safetensors").read_bytes()


def test_starting_over_deletes_the_run_but_not_the_lock_that_it_holds(tmp_path):
    """A file that is deleted while open stays in a folder on NFS, which then cannot be deleted."""
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (out / "rows").mkdir(parents=True)
    (out / LOCK_FILE).touch()
    (out / "rows" / "scores.json").write_text("{}")
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (out / "link").symlink_to(elsewhere)
    lock = (out / LOCK_FILE).stat().st_ino
    accept_directory(out, "run", ours=True, different=["seed: 0 and 1"], fresh=True)
    assert [(path.name, path.stat().st_ino) for path in out.iterdir()] == [(LOCK_FILE, lock)]
    assert (elsewhere / "precious").exists()
