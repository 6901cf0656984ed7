"""Folders and files that are filled beside their place; the next run removes what a killed one left.

A run locks what it fills, and the lock ends with its process: what lies there unlocked is a dead run's.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

_END = ".unfinished"


@contextmanager
def unfinished_folder(place: Path) -> Iterator[Path]:
    """A folder to fill and rename to its place; a folder that is not renamed is deleted at the end.

    >>> with unfinished_folder(Path("model")) as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    ...     _ = folder.rename("model")
    >>> [path.name for path in Path(".").glob("*mod*")]
    ['model']
    """
    _remove_leftovers(place)
    folder = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=_END))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def unfinished_file(place: Path) -> Iterator[tuple[FileIO, Path]]:
    """A file, opened without a buffer, to fill and rename to its place; one that is not renamed is deleted."""
    _remove_leftovers(place)
    descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=_END)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            _lock(descriptor)
            yield file, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _remove_leftovers(place: Path) -> None:
    left = re.compile(rf"\.{re.escape(place.name)}\.[a-z0-9_]{{8}}{re.escape(_END)}")
    for path in place.parent.iterdir():
        if left.fullmatch(path.name) is None:
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError:  # gone, another user's, or a link
            continue
        try:
            if not _lock(descriptor):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file or folder; False where another process holds the lock, or the system has none."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
