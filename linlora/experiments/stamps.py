"""Stamps of files: a run directory is not continued with files that have changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from linlora.training.data import is_file
from linlora.training.settings import Settings


def stamp(files: Iterable[Path]) -> str:
    """The number and size of files, and a hash of their names, sizes and times of change."""
    found = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in sorted(files) if file.is_file()]
    digest = hashlib.sha256(repr(found).encode()).hexdigest()[:8]
    return f"{len(found)} files, {sum(size for _, size, _ in found):,} bytes, {digest}"


def stamps(*tasks: Settings) -> dict[str, str]:
    """By path, the stamps of the local files that tasks read: their rows, and the point they start from."""
    named: set[str] = set()
    for of in tasks:
        splits = (of.data.train, of.data.validation, of.data.test, of.data.prototypes)
        named |= {split for split in splits if isinstance(split, str) and is_file(split)}
        named |= {path for path in (of.point, of.data.path) if path is not None}
    paths = {name: Path(name).expanduser() for name in sorted(named)}
    return {name: stamp(_files(path)) for name, path in paths.items() if path.exists()}


def _files(path: Path) -> list[Path]:
    """A file itself; of a folder its tables and tensors, for logs and runs may lie there too."""
    if path.is_file():
        return [path]
    return [file for file in path.iterdir() if is_file(file.name) or file.suffix == ".safetensors"]
