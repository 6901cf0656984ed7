"""Reads and writes task vectors as safetensors files: tensors, scope, scalings, point, checksums."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from linlora.layers.vanilla import usable_scaling
from linlora.storage.files import CorruptFileError, parse_json
from linlora.storage.tensor_files import TensorFile, save_tensors
from linlora.storage.tensors import StoredTensors, joined
from linlora.vectors.points import point_hash, some

FORMAT = "linlora.task_vector"
FORMAT_VERSION = "2"
_VERSIONS = ("1", FORMAT_VERSION)  # 1 had checksums of the tensors alone
_PARTNERS = {"dA": "A0", "dB": "B0", "A0": "dA", "B0": "dB"}
_SCOPES = ("lora", "layer", "model", "weight")


class Content(NamedTuple):
    """The fields of a task vector, in their order, and the metadata of its file."""

    deltas: Mapping[str, Tensor]
    point: Mapping[str, Tensor] | None
    point_hash: str
    scalings: dict[str, float]
    scope: str
    base_model: str | None
    changed_base: str | None
    metadata: Mapping[str, str]


def write_vector(path: str | os.PathLike, content: Content) -> None:
    """Write a vector, its metadata beside those of its fields. A killed save leaves the previous file whole."""
    check_scalings(content.scalings, "save")
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "scope": content.scope,
        "point_hash": content.point_hash,
        "scalings": json.dumps(content.scalings),
        "base_model": content.base_model or "",
        **({"changed_base": content.changed_base} if content.changed_base else {}),
        **content.metadata,
    }
    save_tensors(path, joined(content.deltas, content.point or {}), metadata)


def read_vector(path: str | os.PathLike) -> Content:
    """Open a file of `write_vector`; a tensor is read, and checked, when it is asked for. Raises CorruptFileError."""
    file = TensorFile(path)
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise CorruptFileError(f"{path}: not a task vector (no '{FORMAT}' in its metadata)")
    version = metadata.get("format_version")
    if version not in _VERSIONS:
        raise CorruptFileError(
            f"{path}: format version {version}, this linlora reads {', '.join(_VERSIONS)}; update linlora"
        )
    if version != "1" and not file.has_header_checksum:
        raise CorruptFileError(f"{path}: its metadata has no checksum; the file was altered")
    if missing := [key for key in ("scope", "point_hash", "scalings", "base_model") if key not in metadata]:
        raise CorruptFileError(f"{path}: its metadata has no {some(missing)}; the file was altered")
    deltas = {name: file.like(name) for name in file.entries if name.endswith((".dA", ".dB"))}
    point = {name: file.like(name) for name in file.entries if name not in deltas}
    scalings = parse_json(metadata["scalings"], f"{path}: its scalings")
    check_scalings(scalings, str(path))
    layers = {name.rpartition(".")[0] for name in deltas}
    scope = metadata["scope"]
    if scalings.keys() != layers or scope not in _SCOPES:
        raise CorruptFileError(f"{path}: its metadata does not fit its tensors; the file was altered")
    _check_shapes(path, deltas, point)
    if scope == "lora" and metadata["point_hash"] == point_hash({}):
        scope = "weight"  # A and B without a start, as linlora wrote plain adapters before it knew weight space
    if scope == "weight" and (lost := [layer for layer in layers if f"{layer}.dA" not in deltas]):
        raise CorruptFileError(f"{path}: layer '{lost[0]}' has no A; the file was altered")
    hash_alone = not point and metadata["point_hash"] != point_hash({})
    at = None if hash_alone else StoredTensors(point, file.read)
    if at is not None and not file.has_tensor_checksums and point_hash(at) != metadata["point_hash"]:
        raise CorruptFileError(f"{path}: the linearization point does not match its hash; the file was altered")
    scalings = {layer: float(scaling) for layer, scaling in scalings.items()}
    return Content(
        StoredTensors(deltas, file.read), at, metadata["point_hash"], scalings, scope, metadata["base_model"] or None,
        metadata.get("changed_base"), metadata,
    )  # fmt: skip


def check_scalings(scalings: Mapping[str, Any], where: str) -> None:
    """Raise a CorruptFileError unless every scaling is a finite number of ordinary size."""
    for layer, scaling in scalings.items():
        if not usable_scaling(scaling):
            raise CorruptFileError(
                f"{where}: layer '{layer}' has the LoRA scaling {reprlib.repr(scaling)}, which cannot be meant"
            )


def _check_shapes(path: str | os.PathLike, deltas: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> None:
    """Raise a CorruptFileError unless the tensors of each layer are factors (r, K) and (N, r) that fit each other."""
    tensors = {**deltas, **point}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind not in ("dA", "dB", "A0", "B0") or f"{layer}.dB" not in deltas or tensor.dim() != 2:
            raise CorruptFileError(f"{path}: '{name}' {tuple(tensor.shape)} is no factor of a layer in it")
        if not tensor.is_floating_point():
            raise CorruptFileError(f"{path}: '{name}' is {tensor.dtype}; factors are of floating point")
        like = tensors.get(f"{layer}.{_PARTNERS[kind]}", tensor)
        rank = tensor.shape[0 if kind in ("dA", "A0") else 1]
        if tensor.shape != like.shape or rank != deltas[f"{layer}.dB"].shape[1]:
            raise CorruptFileError(
                f"{path}: '{name}' {tuple(tensor.shape)} does not fit the other factors of its layer; the file was "
                "altered"
            )
