"""Files are whole or absent."""

import pytest
import torch

from linlora import files, tensor_files


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
