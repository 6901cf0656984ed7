"""Files that are whole or absent: a killed save leaves the previous one, a broken file is refused by name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class CorruptFileError(ValueError):
    """A file is truncated, foreign or holds values that cannot be meant; the message names file and tensor."""


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file beside its place and rename it there."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file beside its place and rename it there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
    install_file(file.name, path)


def install_file(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Flush a finished file to disk and rename it to its place in one step."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
