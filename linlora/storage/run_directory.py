"""The run directory: whose settings it belongs to, and artefacts that are whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from linlora.storage import files
from linlora.storage.files import CorruptFileError, write_text
from linlora.storage.tensor_files import load_tensors

SETTINGS_FILE = "settings.json"
LOCK_FILE = ".lock"


class DifferentSettingsError(ValueError):
    """The run directory was made with other settings; the message names them and what to do."""


def open_run_directory(out: Path, fingerprint: dict[str, Any], fresh: bool, job: str) -> None:
    """Create a run directory, or accept one of the same settings to continue. Raises as `accept_directory`.

    One with content whose `settings.json` does not name the job was not made by it.
    """
    settings_file = out / SETTINGS_FILE
    before = _settings(settings_file)
    now = json.loads(json.dumps({"job": job, **fingerprint}))  # tuples become lists, as in the file
    different = [f"{k}: {before.get(k)} and {now.get(k)}" for k in sorted(before | now) if before.get(k) != now.get(k)]
    accept_directory(out, f"{job} run", before.get("job") == job, different, fresh)
    write_text(settings_file, json.dumps(now, indent=2))


def accept_directory(out: Path, what: str, ours: bool, different: Sequence[str], fresh: bool) -> None:
    """Accept a directory that is new, empty or holds a run of the same settings; with `fresh` delete the run in it.

    Args:
        what: the kind of run, for messages.
        ours: whether it holds one; any other content is never written to, nor deleted.
        different: the settings in which that run differs, in words.

    Raises FileExistsError for other content, DifferentSettingsError for a run of other settings.
    """
    empty = not out.exists() or (out.is_dir() and all(path.name == LOCK_FILE for path in out.iterdir()))
    if not ours and not empty:
        raise FileExistsError(f"{out} is not empty and not a {what}; choose another --out")
    if ours and fresh:
        shutil.rmtree(out)
    elif ours and different:
        raise DifferentSettingsError(
            f"{out} holds a run of other settings (there and now: {'; '.join(different)}); choose another --out, or "
            "start over with --fresh"
        )


def _settings(file: Path) -> dict[str, Any]:
    """The content of a settings file; nothing, if it is not there or not one of ours."""
    try:
        return files.read_json(file)
    except (OSError, CorruptFileError):
        return {}


@contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Keep a second process out of a run directory: two would write the same files. The lock ends with the process."""
    lock = FileLock(out / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileExistsError(f"another process is working in {out}; wait for it, or choose another --out") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of `directory` in one step when the block ends well.

    So an artefact directory that exists is complete, however the run that was writing it ended.
    """
    staging = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    shutil.rmtree(directory, ignore_errors=True)
    staging.rename(directory)


def is_whole(directory: Path, *files: str) -> bool:
    """Whether all files of an artefact are there and readable; what is not will be made again."""
    return all(_is_readable(directory / file) for file in files)


def _is_readable(file: Path) -> bool:
    try:
        if file.suffix == ".safetensors":
            load_tensors(file)
        else:
            files.read_json(file)
    except (FileNotFoundError, CorruptFileError):
        return False
    return True


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    return files.read_json(path)
