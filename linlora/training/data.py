"""Rows: the splits of a data set of the hub, of local files or of a folder of images, checked for what is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from linlora.training.settings import Data

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_HOLD_OUT_SEED = 0  # the same rows for every seed of training
SPLITS = ("train", "validation", "test")


def load_split(data: Data, split: str, columns: Iterable[str]) -> Any:
    """The rows of "train", "validation" or "test" as a `datasets.Dataset`, in the order of the files.

    Rows held out of train for validation are drawn at random, the same ones for every seed, and are not in train.

    Raises ValueError: no such split or column, with those there are, no row, or an empty cell; FileNotFoundError: no
    such file.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; choose one of {', '.join(SPLITS)}")
    held_out = data.validation
    if split == "test" and data.test is None:
        raise ValueError("there is no test split: data.test is not set; choose the split 'validation', or set it")
    if isinstance(held_out, str) or split == "test":
        rows = _load(data, str(getattr(data, split)))
    else:
        rows = _load(data, data.train)
        if len(rows) < 2 or held_out >= len(rows):
            raise ValueError(
                f"data.validation holds out {held_out} rows, and {_source(data, data.train)} has {len(rows)}"
            )
        size = held_out if held_out < 1 else int(held_out)
        both = rows.train_test_split(test_size=size, seed=_HOLD_OUT_SEED)
        rows = both["train" if split == "train" else "test"]
    _check_columns(rows, columns, data, split)
    if not len(rows):
        raise ValueError(f"the {split} split, {_source(data, getattr(data, split))}, has no rows")
    return rows


def is_file(path: str) -> bool:
    """Whether a path names a file of rows, by its ending."""
    return Path(path).suffix.lower() in _READERS


def _load(data: Data, split: str) -> Any:
    import datasets

    path = data.path
    try:
        if is_file(split):
            return _load_file(split, "train")
        if path is None:
            raise ValueError(f"data.path is missing, and '{split}' is not a csv, tsv, json, jsonl or parquet file")
        if is_file(path):
            return _load_file(path, split)
        if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
            raise FileNotFoundError(f"data.path: there is no folder {path}")
        return datasets.load_dataset(
            str(Path(path).expanduser()) if path.startswith("~") else path, data.config, split=split
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"data.path: '{path}' is no local file or folder and not found on the hub ({error})"
        ) from error
    except ConnectionError as error:
        raise ValueError(
            f"data.path: '{path}' is not a local file or folder, and the hub is out of reach: {error}"
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(f"{_source(data, split)} could not be read: {reason}") from error
    except datasets.data_files.EmptyDatasetError as error:
        raise ValueError(f"{_source(data, split)} has no rows: {error}") from error
    except ValueError as error:  # an unknown split or configuration: the message lists those there are
        hint = "; name one, or hold rows out of train (validation: 0.1)" if "Unknown split" in str(error) else ""
        raise ValueError(f"{_source(data, split)}: {str(error).rstrip('.')}{hint}") from error


def _load_file(path: str, split: str) -> Any:
    import datasets

    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"data: there is no file {path}")
    reader, options = _READERS[file.suffix.lower()]
    return datasets.load_dataset(reader, data_files=str(file), split=split, **options)


def _check_columns(rows: Any, columns: Iterable[str], data: Data, split: str) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"the {split} split, {_source(data, str(getattr(data, split)))}, has no column "
            f"{', '.join(map(repr, missing))}; its columns are {', '.join(rows.column_names)}"
        )
    for column in columns:
        if empty := rows.data.column(column).null_count:
            raise ValueError(
                f"column '{column}' of {_source(data, str(getattr(data, split)))} is empty in {empty} rows; fill it "
                "in, or leave these rows out"
            )


def _source(data: Data, split: Any) -> str:
    if isinstance(split, str) and is_file(split):
        return split
    return f"'{split}' of {data.path}" + (f" ({data.config})" if data.config else "")
