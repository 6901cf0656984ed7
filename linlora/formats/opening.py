"""Detects an adapter's format and opens it as a task vector."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path

from torch import Tensor

from linlora.formats.adapter_config import CONFIG_FILE
from linlora.formats.l_lora import LINEARIZED_FILE, open_l_lora
from linlora.formats.peft_adapter import PICKLE_FILE, TENSOR_FILE, open_peft_adapter
from linlora.formats.stored import Stored
from linlora.formats.vector_folder import TASK_VECTOR_FILE, open_vector_folder
from linlora.storage.files import CorruptFileError
from linlora.storage.run_directory import TRAINING_FILE, made_by
from linlora.storage.tensor_files import TensorFile
from linlora.vectors.files import FORMAT
from linlora.vectors.points import DifferentPointError, point_hash, point_name
from linlora.vectors.task_vector import TaskVector

ADAPTER_FILES = (TASK_VECTOR_FILE, LINEARIZED_FILE, TENSOR_FILE, PICKLE_FILE)
"""The files that hold an adapter; of several in a folder the first is read."""
_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def read(path: str | os.PathLike, point: TaskVector | str | os.PathLike | None = None) -> TaskVector:
    """The task vector of an adapter in a file or folder of any format (see `linlora.formats`).

    Args:
        path: a task vector, or the folder of a PEFT adapter, an L-LoRA checkpoint or `linlora.export`.
        point: for a plain LoRA adapter, the adapter its training started from (a vector of scope "lora", or a path):
            then the vector is the change from there, of scope "lora". Without it the vector is what the adapter adds
            to the weights, of scope "weight".

    Raises FileNotFoundError; CorruptFileError for what is truncated, altered, foreign or not finite, by its name.

    >>> import linlora
    >>> model = linlora.testing.tiny_model("bert")
    >>> model.save_pretrained("adapter")
    >>> vector = read("adapter")
    >>> vector.scope, len(vector.scalings)
    ('weight', 11)
    """
    vector = open(path).vector
    return (vector if point is None else from_start(vector, point)).loaded()


def open(path: str | os.PathLike) -> Stored:
    """Open the adapter in a file or folder; tensors are read when they are asked for. Raises as `read` does.

    >>> import linlora
    >>> linlora.testing.tiny_model("bert", modules_to_save=["classifier"]).save_pretrained("adapter")
    >>> stored = open("adapter")
    >>> stored.kind, list(stored.extras)
    ('PEFT LoRA adapter', ['classifier.bias', 'classifier.weight'])
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file or folder; an adapter of the Hugging Face hub has to be downloaded first: "
            "hf download OWNER/NAME --local-dir FOLDER"
        )
    return _open_file(path)


def from_start(vector: TaskVector, start: TaskVector | str | os.PathLike) -> TaskVector:
    """A vector of plain LoRA as the change from the adapter its training started from. Raises DifferentPointError."""
    start = start if isinstance(start, TaskVector) else open(start).vector
    if not {vector.scope, start.scope} <= {"lora", "weight"}:
        raise DifferentPointError(
            f"a vector of scope '{vector.scope}' cannot be read from a start of scope '{start.scope}': that is for "
            "two plain adapters; a linearized adapter knows where it started"
        )
    start.check_same_layers(vector)
    for layer, scaling in vector.scalings.items():
        if not math.isclose(scaling, start.scalings[layer], rel_tol=1e-6):
            raise DifferentPointError(
                f"the scaling of layer '{layer}' is {scaling:g} in the adapter and {start.scalings[layer]:g} in the "
                "one its training is to have started from"
            )
    vector, start = vector.loaded(), start.loaded()
    point = {point_name(name): _at(start, name) for name in start.deltas}
    deltas = {name: _at(vector, name) - point[point_name(name)] for name in vector.deltas}
    return TaskVector(deltas, point, point_hash(point), vector.scalings, "lora", vector.base_model, vector.changed_base)


def _at(vector: TaskVector, name: str) -> Tensor:
    """The factor that a vector ends at."""
    delta, start = vector.deltas[name], point_name(name)
    return vector.point[start] + delta if vector.point and start in vector.point else delta


def _open_folder(folder: Path) -> Stored:
    if (folder / TASK_VECTOR_FILE).is_file():
        return open_vector_folder(folder)
    if (folder / LINEARIZED_FILE).is_file():
        return open_l_lora(folder)
    if (folder / TENSOR_FILE).is_file() or (folder / PICKLE_FILE).is_file():
        return open_peft_adapter(folder)
    if any((folder / name).is_file() for name in _MODEL_FILES):
        raise CorruptFileError(f"{folder}: a whole model, where an adapter is expected")
    if (folder / TRAINING_FILE).is_file():
        resumed = shlex.quote(str(folder / TRAINING_FILE))
        raise FileNotFoundError(f"the run in {folder} is not finished; to continue: linlora train {resumed}")
    if (job := made_by(folder).get("job")) is not None:
        raise FileNotFoundError(f"{folder}: the folder of a comparison or a quickstart ({job}); leave it out")
    inside = sorted({str(path.parent) for path in folder.glob("*/*") if path.name in ADAPTER_FILES and path.is_file()})
    hint = f"; there are adapters in {', '.join(inside[:3])}" if inside else ""
    raise FileNotFoundError(f"{folder}: no adapter in this folder (none of {', '.join(ADAPTER_FILES)}){hint}")


def _open_file(path: Path) -> Stored:
    if path.name in (TENSOR_FILE, PICKLE_FILE, LINEARIZED_FILE):
        return _open_folder(path.parent)
    if path.suffix != ".safetensors":
        raise CorruptFileError(f"{path}: not an adapter; a .safetensors file or the folder of an adapter is expected")
    with TensorFile(path) as file:
        written_as, names = file.metadata.get("format"), list(file.entries)
    if written_as == FORMAT:
        return Stored(path, "task vector", TaskVector.open(path))
    if any("lora_" in name for name in names):
        raise CorruptFileError(
            f"{path}: LoRA factors without their {CONFIG_FILE}, so their scaling is unknown; pass the folder that "
            f"holds {TENSOR_FILE} and {CONFIG_FILE}"
        )
    kind = f"of format '{written_as}' " if written_as else ""
    raise CorruptFileError(
        f"{path}: not a task vector; a safetensors file {kind}with {len(names)} tensors ({', '.join(names[:3])}, ...)"
    )
