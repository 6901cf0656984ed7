"""The folder of a base model: which of its files may be read, and which go with a merged model.

Anyone may have made the folder. Nothing outside of it is read, whatever its index or its links say, but for the hub's
cache, whose folders are links to its own blobs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from linlora.formats.adapter_config import CONFIG_FILE as ADAPTER_CONFIG_FILE
from linlora.formats.opening import ADAPTER_FILES
from linlora.storage.files import CorruptFileError, read_json

_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".gguf", ".pt", ".pth", ".ckpt", ".ot")
_OF_A_MODULE = (".safetensors", ".bin")
_MODULES_FILE, _INDEX = "modules.json", ".index.json"


def inside(folder: Path, path: Path) -> Path:
    """The path, if it lies in the folder with all links followed. Raises CorruptFileError otherwise."""
    home, target = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise CorruptFileError(
            f"{path}: a link to {target}, outside of {folder}, where nothing is read; put the file itself in its place"
        )
    return path


def shard(folder: Path, name: str) -> Path:
    """The file that an index names. Raises CorruptFileError for what is no plain name of a file in the folder."""
    if not name.endswith(".safetensors") or set(name) & set("/\\\0:"):
        raise CorruptFileError(f"{folder}: its index names the shard {name!r}, which is no safetensors file in it")
    path = folder / name
    if not path.is_file():
        raise CorruptFileError(f"{folder}: the shard {name} of its index is missing")
    return inside(folder, path)


def beside_the_weights(folder: Path, weights: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Split the files of a base into those copied beside a merged model and those left out; hidden ones are neither.

    Copied are configuration, tokenizer, and the weights of further modules in folders of their own. Left out are
    adapters and weights in other formats: they belong to the model before the merge; and weights of other models.

    Args:
        weights: the files that are written anew, the index among them.
    """
    further = _further_modules(folder)
    kept: list[Path] = []
    left: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(place) / name).is_symlink():
                raise CorruptFileError(
                    f"{Path(place) / name}: a link to a folder, which is not followed; copy it there"
                )
        for name in sorted(files):
            path = Path(place) / name
            relative = path.relative_to(folder)
            if name.startswith(".") or not path.is_file() or str(relative) in weights:
                continue
            (kept if _goes_along(folder, relative, further) else left).append(relative)
    return [inside(folder, folder / path).relative_to(folder) for path in kept], left


def _goes_along(folder: Path, path: Path, further: set[Path]) -> bool:
    home = folder / path.parent
    if path.name in (ADAPTER_CONFIG_FILE, *ADAPTER_FILES) and (home / ADAPTER_CONFIG_FILE).is_file():
        return False
    if not (path.suffix in _WEIGHTS or path.name.endswith(_INDEX)):
        return True
    if any(path.is_relative_to(module) for module in further):
        return True
    if path.parent == Path():
        return False
    other_format = (folder / path).with_suffix(".xml").is_file()  # OpenVINO's
    return (path.suffix in _OF_A_MODULE or path.name.endswith(_INDEX)) and not other_format and not _is_model(home)


def _further_modules(folder: Path) -> set[Path]:
    """The folders of the further modules of a sentence-transformers model."""
    if not (folder / _MODULES_FILE).is_file():
        return set()
    modules = read_json(inside(folder, folder / _MODULES_FILE), list)
    paths = [module.get("path") for module in modules if isinstance(module, dict)]
    return {Path(path) for path in paths if isinstance(path, str) and Path(path) != Path()}


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model of its own, a checkpoint of the training for instance."""
    config = folder / "config.json"
    try:
        return config.is_file() and bool({"model_type", "architectures"} & read_json(config).keys())
    except CorruptFileError:
        return False
