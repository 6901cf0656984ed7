"""Folders and files that are filled beside their place; the next run removes what a killed one left.

A run locks what it fills, and the lock ends with its process: what lies there unlocked is a dead run's.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

_END = ".unfinished"


def refuse_existing(folder: str | os.PathLike) -> None:
    """Raise a FileExistsError unless a folder to write is new or empty, and not the one the process works in."""
    place = Path(folder).resolve()
    if place == Path.cwd() or (place.exists() and not (place.is_dir() and not any(place.iterdir()))):
        raise FileExistsError(f"{folder} exists already; choose another folder, or remove it")


@contextmanager
def unfinished_folder(place: Path) -> Iterator[Path]:
    """A folder to fill and rename to its place; a folder that is not renamed is deleted at the end.

    >>> with unfinished_folder(Path("model")) as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    ...     _ = folder.rename("model")
    >>> [path.name for path in Path(".").glob("*mod*")]
    ['model']
    """
    folder, descriptor = _locked(place, _new_folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def unfinished_file(place: Path) -> Iterator[tuple[FileIO, Path]]:
    """A file, opened without a buffer, to fill and rename to its place; one that is not renamed is deleted."""
    path, descriptor = _locked(place, _new_file)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            yield file, path
    finally:
        path.unlink(missing_ok=True)


def _locked(place: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """What is created beside a place, and its descriptor, locked; made anew where another run removed it unlocked."""
    while True:
        with _naming(place.parent):
            path = _beside(place)
            try:
                descriptor = create(path)
            except FileNotFoundError:  # between the two steps of a folder, or with all around it
                continue
        _lock(descriptor, wait=True)  # for one that is just removing it
        if path.exists():
            return path, descriptor
        os.close(descriptor)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """An error of a folder that cannot be written, with the folder's name in place of one that nobody chose."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise type(error)(f"cannot write in {folder}: {os.strerror(error.errno)}; choose another folder") from error


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


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


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file or folder; False where another run holds the lock and one does not wait, or there is none."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True
