"""A task vector beside the PEFT adapter that it is: two files of one folder, which have to stay those of one adapter.

The vector's file holds a digest of the adapter's factors and scalings. So an adapter that was saved over it is found,
however little was trained meanwhile. Folders without one, a vector that was saved there by itself or by an earlier
linlora, are compared by values, up to rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from linlora.formats.adapter_config import CONFIG_FILE, read_config, scalings
from linlora.formats.peft_adapter import TENSOR_FILE, split
from linlora.formats.stored import Stored
from linlora.storage.files import CorruptFileError, read_json
from linlora.storage.tensor_files import TensorFile
from linlora.vectors.factors import factors_of
from linlora.vectors.files import write_vector
from linlora.vectors.points import point_hash
from linlora.vectors.task_vector import TaskVector

TASK_VECTOR_FILE = "task_vector.safetensors"
_DIGEST = "adapter"
"""The entry of the metadata of a vector's file."""


def save_beside(vector: TaskVector, folder: Path) -> None:
    """Write a vector into a folder, and with it the digest of the adapter there, if there is one of its function."""
    content = vector.content()
    if vector.scope != "model" and all((folder / name).is_file() for name in (TENSOR_FILE, CONFIG_FILE)):
        with TensorFile(folder / TENSOR_FILE) as file:
            factors, _ = split(file.tensors(), folder)
            digest = _digest(factors, scalings(factors.like, read_json(folder / CONFIG_FILE), folder))
        content = content._replace(metadata={**content.metadata, _DIGEST: digest})
    write_vector(folder / TASK_VECTOR_FILE, content)


def open_vector_folder(folder: Path) -> Stored:
    """The vector, and of the adapter beside it the configuration and the trained parameters.

    Raises CorruptFileError where the two are of different adapters.
    """
    vector = TaskVector.open(folder / TASK_VECTOR_FILE)
    config = read_config(folder) if (folder / CONFIG_FILE).is_file() else {}
    extras: Mapping[str, Tensor] = {}
    if (folder / TENSOR_FILE).is_file():
        factors, extras = split(TensorFile(folder / TENSOR_FILE).tensors(), folder)
        if config and not _is_of(folder, vector, factors, scalings(factors.like, config, folder)):
            raise CorruptFileError(
                f"{folder}: {TASK_VECTOR_FILE} and {TENSOR_FILE} are of different adapters: one was saved over the "
                "other's folder. Remove the file that is not meant"
            )
    return Stored(folder, "linlora adapter (task vector beside a PEFT adapter)", vector, extras, config)


def _is_of(folder: Path, vector: TaskVector, factors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> bool:
    with TensorFile(folder / TASK_VECTOR_FILE) as file:
        written = file.metadata.get(_DIGEST)
    if written is not None:
        return written == _digest(factors, scaling)
    has_factors = vector.scope != "model" and vector.point is not None and vector.changed_base is None
    return not has_factors or _are_factors_of(vector, factors, scaling)


def _digest(factors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> str:
    return hashlib.sha256(f"{point_hash(factors)} {sorted(scaling.items())}".encode()).hexdigest()


def _are_factors_of(vector: TaskVector, factors: Mapping[str, Tensor], scaling: Mapping[str, float]) -> bool:
    """Whether A and s B of every layer are those of a vector, up to rounding."""
    if vector.scalings.keys() != scaling.keys():
        return False
    for layer in scaling:
        for kind, mine, s in zip(("dA", "dB"), factors_of(vector, layer), (1.0, vector.scalings[layer]), strict=True):
            its = factors[f"{layer}.{kind}"].to(mine.dtype) * (scaling[layer] if kind == "dB" else 1.0)
            rounding = 4.0 * torch.finfo(torch.float32).eps * (s * mine).norm()
            if vector.scope == "lora":  # A - A0 was rounded in its dtype
                delta = vector.deltas[f"{layer}.{kind}"]
                rounding += torch.finfo(delta.dtype).eps * (s * delta.float()).norm()
            if mine.shape != its.shape or not (s * mine - its).norm() <= rounding:
                return False
    return True
