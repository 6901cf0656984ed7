"""Reads files of PyTorch's pickle format without running the code in them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linlora.storage.files import CorruptFileError
from linlora.storage.tensors import finite


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict in a pickle.

    Raises FileNotFoundError, and CorruptFileError for a file that is broken, that holds anything but named tensors, or
    NaN.

    >>> torch.save({"w": torch.ones(2)}, "adapter_model.bin")
    >>> load(Path("adapter_model.bin"))
    {'w': tensor([1., 1.])}
    """
    tensors = load_content(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CorruptFileError(f"{path}: a dictionary of tensors is expected; this is another kind of checkpoint")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not _lies_whole(tensor):
            raise CorruptFileError(f"{path}: '{name}' is no tensor whose values are all in the file")
        if not finite(tensor):
            raise CorruptFileError(f"{path}: tensor '{name}' holds NaN or infinity; the run that wrote it diverged")
    return tensors


def load_content(path: Path) -> Any:
    """The content of a pickle, by PyTorch's unpickler of tensors and plain Python values alone (`weights_only`).

    Raises FileNotFoundError, and CorruptFileError for a file that is broken or holds more.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CorruptFileError(
            f"{path}: a pickle that holds more than tensors, or a broken one; to load it could run code in it, so it "
            "is refused. If you trust it, load it with the library that wrote it and save it as safetensors"
        ) from error
    except Exception as error:  # whatever a broken pickle makes the unpickler do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptFileError(f"{path}: not a whole PyTorch file ({reason}); it may be truncated") from error


def _check_archive(path: Path) -> None:
    """Raise a CorruptFileError for an archive with a file that does not match its CRC, or is compressed.

    PyTorch compresses none, and a compressed one could take any size in memory. Before PyTorch 1.6 files were no
    archives.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = (file.filename for file in archive.infolist() if file.compress_type != zipfile.ZIP_STORED)
            damaged = next(packed, None) or archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, OverflowError) as error:
        raise CorruptFileError(f"{path}: not a whole PyTorch file ({error}); it may be truncated") from error
    if damaged is not None:
        raise CorruptFileError(f"{path}: not a whole PyTorch file ('{damaged}' in it was altered)")


def _lies_whole(tensor: Tensor) -> bool:
    """Whether a tensor has memory for every value; a file can claim any number of them."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
