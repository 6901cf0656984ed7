"""The folder of a run: it belongs to one set of settings and one process, and its artefacts are whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from linlora.storage.files import CorruptFileError, read_json, write_json
from linlora.storage.staging import unfinished_folder
from linlora.storage.tensor_files import load_tensors

SETTINGS_FILE = "settings.json"
TRAINING_FILE = "settings.yaml"
"""The settings of `linlora train`; a folder that has them, and no adapter, is of a run that is not finished."""
LOCK_FILE = ".lock"


class DifferentSettingsError(ValueError):
    """The run directory was made with other settings; the message names them and what to do."""


def open_run_directory(out: Path, fingerprint: dict[str, Any], fresh: bool, job: str) -> None:
    """Create a run directory, or accept one of the same settings to continue. Raises as `accept_directory`.

    One with content whose `settings.json` does not name the job was not made by it.
    """
    before = made_by(out)
    now = json.loads(json.dumps({"job": job, **fingerprint}))  # tuples become lists, as in the file
    different = [f"{k}: {before.get(k)} and {now.get(k)}" for k in sorted(before | now) if before.get(k) != now.get(k)]
    accept_directory(out, f"{job} run", before.get("job") == job, different, fresh)
    write_json(out / SETTINGS_FILE, now)


def made_by(out: Path) -> dict[str, Any]:
    """The job that made a run directory, under `job`, and its settings; empty where they are absent or not ours."""
    try:
        return read_json(out / SETTINGS_FILE)
    except (OSError, CorruptFileError):
        return {}


def accept_directory(out: Path, what: str, ours: bool, different: Sequence[str], fresh: bool) -> None:
    """Accept a directory that is new, empty or holds a run of the same settings; with `fresh` delete the run in it.

    Args:
        what: the kind of run, for messages.
        ours: whether it holds one; any other content is never written to, nor deleted.
        different: the settings in which that run differs, in words.

    Raises FileExistsError for other content, or for a run to delete in which another process works;
    DifferentSettingsError for a run of other settings.
    """
    empty = not out.exists() or (out.is_dir() and all(path.name == LOCK_FILE for path in out.iterdir()))
    if not ours and not empty:
        raise FileExistsError(f"{out} is not empty and not a {what}; choose another --out")
    if ours and fresh:
        with only_run_in(out):
            for path in out.iterdir():
                if path.name == LOCK_FILE:  # it is open: a file system of the network would keep it by another name
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    elif ours and different:
        raise DifferentSettingsError(
            f"{out} holds a run of other settings (there and now: {'; '.join(different)}); choose another --out, or "
            "start over with --fresh"
        )


@contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Keep a second process out of a run directory: two would write the same files. The lock ends with the process."""
    try:
        lock = FileLock(out / LOCK_FILE, timeout=0).acquire()
    except Timeout as error:
        raise FileExistsError(f"another process is working in {out}; wait for it, or choose another --out") from error
    with lock:
        yield


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of `directory` in one step when the block ends well.

    An artefact directory that exists is complete, however the run that was writing it ended.
    """
    with unfinished_folder(directory) as staging:
        yield staging
        shutil.rmtree(directory, ignore_errors=True)
        staging.rename(directory)


def is_whole(directory: Path, *files: str) -> bool:
    """Whether all files of an artefact are there and readable; an artefact that is not is made again."""
    try:
        for file in files:
            (load_tensors if file.endswith(".safetensors") else read_json)(directory / file)
    except (FileNotFoundError, CorruptFileError):
        return False
    return True
