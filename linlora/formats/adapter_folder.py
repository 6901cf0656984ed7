"""Writes the folder of an adapter, so that nothing of the adapter that was there is read with it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linlora.formats.model_config import FOLDER
from linlora.formats.opening import ADAPTER_FILES
from linlora.storage.files import install_file
from linlora.storage.staging import unfinished_folder


@contextmanager
def adapter_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill with an adapter; its files then go to `directory`, each in one step.

    Files that would be read in place of the new ones are removed there. An error leaves the directory as it was.
    """
    directory = Path(directory)
    with unfinished_folder(directory / "export") as staging:
        yield staging
        written = [path for path in sorted(staging.rglob("*")) if path.is_file()]
        names = {path.name for path in written}
        for name in itertools.takewhile(lambda name: name not in names, ADAPTER_FILES):
            (directory / name).unlink(missing_ok=True)
        if not (staging / FOLDER).exists():
            (directory / FOLDER / "config.json").unlink(missing_ok=True)
        for file in written:
            file.chmod(staging.stat().st_mode & 0o666)  # as the user has it: safetensors writes for its owner alone
            place = directory / (FOLDER if file.parent.name == FOLDER else "")  # PEFT's own folders are left out
            place.mkdir(exist_ok=True)
            install_file(file, place / file.name)
