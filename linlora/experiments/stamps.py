"""Stamps of files: a run directory is not continued with files that have changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from linlora.training.data import files_in, is_file
from linlora.training.settings import Settings


def stamp(files: Iterable[Path]) -> str:
    """The number and size of files, and a hash of their names, sizes and times of change."""
    found = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in sorted(files) if file.is_file()]
    digest = hashlib.sha256(repr(found).encode()).hexdigest()[:8]
    return f"{len(found)} files, {sum(size for _, size, _ in found):,} bytes, {digest}"


def stamps(*tasks: Settings) -> dict[str, str]:
    """By path, the stamps of the local files that tasks read: their rows, and the point they start from."""
    files: dict[str, set[Path]] = {}
    for of in tasks:
        splits = (of.data.train, of.data.validation, of.data.test, of.data.prototypes)
        named = {split for split in splits if isinstance(split, str) and is_file(split)}
        for name in named | {path for path in (of.point, of.data.path) if path is not None}:
            path = Path(name).expanduser()
            if path.is_file():
                files.setdefault(name, set()).add(path)
            elif path.is_dir():
                found = path.glob("*.safetensors") if name == of.point else files_in(path, of.data)
                files.setdefault(name, set()).update(found)
    return {name: stamp(files[name]) for name in sorted(files)}
