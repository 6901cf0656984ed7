"""Files that are whole or absent: a killed save leaves the previous one, a broken file is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from linlora.storage.staging import unfinished_file

_LARGEST_JSON = 2**26
"""Bytes; the index of a model of 100,000 tensors takes a tenth."""


class CorruptFileError(ValueError):
    """A file is truncated or foreign, or holds values that cannot be meant; the message names file and tensor."""


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The object (or the list, by `kind`) in a JSON file, whoever wrote it.

    Raises FileNotFoundError, and CorruptFileError as `parse_json`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > _LARGEST_JSON:
        raise CorruptFileError(f"{path}: a JSON file of {path.stat().st_size:,} bytes; {_LARGEST_JSON:,} are read")
    return parse_json(path.read_bytes(), str(path), kind)


def parse_json(text: str | bytes, where: str, kind: type = dict) -> Any:
    """The object in a JSON text. Raises CorruptFileError for a text that is none, nests too deep or repeats a key.

    Args:
        where: the origin of the text, for the message.
        kind: list, where that is expected in place of an object.

    >>> parse_json('{"r": 8}', "adapter_config.json")
    {'r': 8}
    >>> parse_json('{"r": 8, "r": 4}', "adapter_config.json")
    Traceback (most recent call last):
    linlora.storage.files.CorruptFileError: adapter_config.json: not JSON (the key 'r' is there twice)
    """
    try:
        content = json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=without_repeats)
    except RecursionError:
        raise CorruptFileError(f"{where}: not JSON that can be meant: it nests too deep") from None
    except ValueError as error:
        raise CorruptFileError(f"{where}: not JSON ({error})") from error
    if not isinstance(content, kind):
        what = "object" if kind is dict else "list"
        raise CorruptFileError(f"{where}: a JSON {what} is expected, got a {type(content).__name__}")
    return content


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its pairs. Raises ValueError for a repeated key, of which readers take the first or the last."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key '{key}' is there twice")
        content[key] = value
    return content


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file beside its place and rename it there."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file beside its place and rename it there."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file beside its place and rename it there."""
    with unfinished_file(Path(path)) as (_, temporary):
        temporary.write_bytes(content)
        install_file(temporary, path)


def install_file(temporary: str | os.PathLike, path: str | os.PathLike) -> None:
    """Flush a finished file to disk and rename it to its place in one step."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
