"""Keeps the number and a digest of the rows a run began with, so that it does not go on with others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from linlora.storage.files import read_json, write_text
from linlora.training.data import source_of
from linlora.training.task import Task

ROWS_FILE = "rows.json"
_AT_ONCE = 1000

Kept = dict[str, dict[str, Any]]


def rows_of(task: Task) -> Kept:
    """How many rows each split has, and a digest of them in their order."""
    splits = [*task.splits, *(["prototypes"] if task.settings.data.prototypes else [])]
    return {split: {"rows": len(task.rows(split)), "sha256": digest(task.rows(split))} for split in splits}


def check_kept(task: Task, now: Kept, folder: Path) -> None:
    """Raise a ValueError where the run in a folder began with other rows."""
    path = folder / ROWS_FILE
    if not path.exists():
        return
    then = read_json(path)
    for split, found in now.items():
        if split in then and then[split] != found:
            counts = f"{then[split].get('rows')} and {found['rows']} rows"
            raise ValueError(
                f"the {split} split, {source_of(task.settings.data, split)}, has changed since the run in {folder} "
                f"began ({counts}); put the old rows back, choose another --out, or start over with --fresh"
            )


def keep(now: Kept, folder: Path) -> None:
    write_text(folder / ROWS_FILE, json.dumps(now, indent=2) + "\n")


def digest(rows: Any) -> str:
    """SHA-256 of the cells of a `datasets.Dataset`; of an image, its file's name and how many bytes it holds."""
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
    names = [None if path is None else Path(path).name for path in column.field("path").to_pylist()]
    return list(zip(names, pc.binary_length(column.field("bytes")).to_pylist(), strict=True))
