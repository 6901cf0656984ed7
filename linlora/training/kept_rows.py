"""Keeps the number and a digest of the rows a run began with, so that it does not go on with others."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from linlora.storage.files import read_json
from linlora.storage.run_directory import write_json
from linlora.training.data import source_of
from linlora.training.task import Task

ROWS_FILE = "rows.json"
_AT_ONCE = 1000

Kept = dict[str, dict[str, Any]]


def checked_rows(task: Task, folder: Path) -> Kept:
    """How many rows each split has, and a digest of them in their order.

    Raises ValueError where the run in the folder began with other rows, those of the test split aside.
    """
    splits = [*task.splits, *(["prototypes"] if task.settings.data.prototypes else [])]
    now = {split: {"rows": len(task.rows(split)), "sha256": digest(task.rows(split))} for split in splits}
    path = folder / ROWS_FILE
    then = read_json(path) if path.exists() else {}
    for split, found in now.items():
        if split in then and split != "test" and then[split] != found:
            counts = f"{then[split].get('rows')} and {found['rows']} rows"
            raise ValueError(
                f"the {split} split, {source_of(task.settings.data, split)}, has changed since the run in {folder} "
                f"began ({counts}); put the old rows back, choose another --out, or start over with --fresh"
            )
    return now


def keep(now: Kept, folder: Path) -> None:
    write_json(folder / ROWS_FILE, now)


def digest(rows: Any) -> str:
    """SHA-256 of the cells of a `datasets.Dataset`; of an image, its file's name and how many bytes it has."""
    found = hashlib.sha256(repr(sorted(rows.column_names)).encode())
    for table in rows.with_format("arrow").iter(_AT_ONCE):
        columns = [_cells(table.column(name).combine_chunks()) for name in sorted(table.column_names)]
        for row in zip(*columns, strict=True):
            found.update(repr(row).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _cells(column: Any) -> list[Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    fields = {field.name for field in column.type} if pa.types.is_struct(column.type) else set()
    if fields != {"bytes", "path"}:
        return column.to_pylist()
    paths, sizes = column.field("path").to_pylist(), pc.binary_length(column.field("bytes")).to_pylist()
    return [
        (path and Path(path).name, os.path.getsize(path) if size is None and path and os.path.isfile(path) else size)
        for path, size in zip(paths, sizes, strict=True)
    ]
