"""Folders and files that are filled beside their place; the next run removes what a killed one left.

A run locks what it fills, and the lock ends with its process: what lies there unlocked is a dead run's.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
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
    folder = _beside(place)
    folder.mkdir()
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
    path = _beside(place)
    try:
        with open(path, "xb", buffering=0) as file:
            _lock(file.fileno())
            yield file, path
    finally:
        path.unlink(missing_ok=True)


def _beside(place: Path) -> Path:
    """A new name beside a place, whose folder is made; what dead runs left there is removed.

    What is created by that name has the permissions that the user gives to new files.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
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
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}{_END}")


def _lock(descriptor: int) -> bool:
    """Lock an open file or folder; False where another process holds the lock, or the system has none."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
