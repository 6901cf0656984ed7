"""Reads the splits of a data set: of the hub, of local files, or of a folder of images."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linlora.training import tables
from linlora.training.settings import Data

_HOLD_OUT_SEED = 0  # the same rows for every seed of training
SPLITS = ("train", "validation", "test")
_ALL_SPLITS = (*SPLITS, "prototypes")


def load_split(data: Data, split: str, columns: Iterable[str]) -> Any:
    """The rows of "train", "validation", "test" or "prototypes" as a `datasets.Dataset`, in the order of the files.

    Rows held out of train for validation are drawn at random, the same ones for every seed, and are not in train.

    Raises ValueError: no such split or column, with those there are, no row, or an empty cell; FileNotFoundError: no
    such file.
    """
    if split not in _ALL_SPLITS:
        raise ValueError(f"unknown split '{split}'; choose one of {', '.join(SPLITS)}")
    held_out = data.validation
    if split == "test" and not has_test(data):
        raise ValueError("there is no test split: data.test is not set; choose the split 'validation', or set it")
    columns = tuple(dict.fromkeys(columns))
    if split == "prototypes" and data.prototypes in (None, data.train):
        split = "train"  # without the rows held out of it
    rows = _load(data, _named(data, split), columns)
    if isinstance(held_out, str) or split not in ("train", "validation"):
        return rows
    if len(rows) < 2 or held_out >= len(rows):
        raise ValueError(f"data.validation holds out {held_out} rows, and {_source(data, data.train)} has {len(rows)}")
    size = held_out if held_out < 1 else int(held_out)
    both = rows.train_test_split(test_size=size, seed=_HOLD_OUT_SEED)
    return both["train" if split == "train" else "test"]


def check_files(data: Data) -> None:
    """Raise a FileNotFoundError for a file that is named and is not there; nothing is read."""
    for source in (data.path, data.train, data.validation, data.test, data.prototypes):
        if isinstance(source, str) and is_file(source) and not Path(source).expanduser().is_file():
            raise FileNotFoundError(f"data: there is no file {source}")


def has_test(data: Data) -> bool:
    """Whether there is a test split: the one that is named, or a split of that name where the rows come from."""
    if data.test is not None:
        return data.test is not False
    if data.path is None or is_file(data.path) or is_file(data.train):
        return False
    return "test" in _splits_of(data.path, data.config)


@functools.cache
def _splits_of(path: str, config: str | None) -> tuple[str, ...]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(Path(path).expanduser()) if path.startswith("~") else path, config)
        return tuple(map(str, builder.info.splits or builder.config.data_files or ()))
    except Exception:  # what is wrong with it is said where its rows are read
        return ()


def is_file(path: str) -> bool:
    """Whether a path names a file of rows, by its ending."""
    return tables.ending(path) in (*tables.ENDINGS, ".parquet")


def _load(data: Data, source: str, columns: Sequence[str]) -> Any:
    """The rows of a split, of a slice of one ("train[:80%]") or of a file, checked."""
    rows = _read(data, source, columns)
    if not len(rows):
        raise ValueError(f"{_source(data, source)} has no data: there are no rows")
    _check_columns(rows, columns, _source(data, source))
    return rows.select_columns(list(columns))


def _read(data: Data, source: str, columns: Sequence[str]) -> Any:
    path = data.path
    if is_file(source):
        return _of_files({"train": [source]}, "train", columns, data)
    if path is None:
        raise ValueError(f"data.path is missing, and '{source}' is not a csv, tsv, json, jsonl or parquet file")
    if is_file(path):
        return _of_files({"train": [path]}, source, columns, data)
    folder = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"data.path: there is no folder {path}")
    with _errors_of_datasets(data, source):
        files = _tables_in(folder, data.config) if folder.is_dir() else {}
    return _of_files(files, source, columns, data) if files else _of_datasets(data, source)


def _of_datasets(data: Data, source: str) -> Any:
    """The rows of what `datasets` reads: a data set of the hub, a folder of images or of parquet files."""
    import datasets

    path = str(data.path)
    with _errors_of_datasets(data, source):
        return datasets.load_dataset(
            str(Path(path).expanduser()) if path.startswith("~") else path, data.config, split=source
        )


@contextmanager
def _errors_of_datasets(data: Data, source: str) -> Iterator[None]:
    """Say in one line what `datasets` could not read."""
    import datasets

    path = data.path
    try:
        yield
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
        raise ValueError(f"{_source(data, source)} could not be read: {reason}") from error
    except datasets.data_files.EmptyDatasetError as error:
        raise ValueError(f"{_source(data, source)} has no rows: {error}") from error
    except ValueError as error:  # an unknown split or configuration: the message lists those there are
        hint = "; name one" if "Unknown split" in str(error) else ""
        if hint and source == data.validation:
            hint += ", or hold rows out of train: --validation 0.1 (data.validation: 0.1)"
        raise ValueError(f"{_source(data, source)}: {str(error).rstrip('.')}{hint}") from error


def files_in(folder: Path, data: Data) -> list[Path]:
    """The files of a folder that `datasets` finds there, in folders of it too; logs and runs may lie beside them."""
    import datasets

    with _errors_of_datasets(data, data.train):
        splits = datasets.load_dataset_builder(str(folder), data.config).config.data_files or {}
    return [Path(name) for of_split in splits.values() for name in of_split]


def _tables_in(folder: Path, config: str | None) -> dict[str, list[str]]:
    """The files of each split of a folder of csv, tsv, json or jsonl files; none where it is another data set."""
    import datasets

    builder = datasets.load_dataset_builder(str(folder), config)
    files = builder.config.data_files or {}
    names = [name for of_split in files.values() for name in of_split]
    declared = builder.info.features is not None  # by the card of the data set, with the types of its columns
    if declared or not names or not all(tables.ending(name) in tables.ENDINGS for name in names):
        return {}
    return {str(split): list(of_split) for split, of_split in files.items()}


def _of_files(files: dict[str, list[str]], source: str, columns: Sequence[str], data: Data) -> Any:
    """The rows of a split, or of a slice of one, where each split is some files."""
    import datasets

    named = {part.split("[")[0].strip() for part in source.split("+")}
    parts = {split: _of_split(files[split], columns, data.label) for split in files if split in named}
    sizes = {split: len(parts[split]) if split in parts else 0 for split in files}
    with _errors_of_datasets(data, source):
        chosen = datasets.ReadInstruction.from_spec(source).to_absolute(sizes)
    return datasets.concatenate_datasets([parts[part.splitname].select(range(part.from_, part.to)) for part in chosen])


def _of_split(files: Sequence[str], columns: Sequence[str], label: str) -> Any:
    """The rows of one or more files, one after the other."""
    import datasets

    paths = [Path(name).expanduser() for name in files]
    for name, path in zip(files, paths, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"data: there is no file {name}")
    if tables.ending(paths[0]) == ".parquet":
        source = ", ".join(files)
        with _errors_of_datasets(Data(source), "train"):
            return datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    cells: tables.Columns = {column: [] for column in columns}
    for path in paths:
        names, found = tables.read_columns(path, columns, label)
        _check_names(names, columns, str(path))
        for column in columns:
            cells[column] += found[column]
    source = str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"
    as_text = tables.ending(paths[0]) in (".csv", ".tsv")
    typed = {c: tables.typed_cells(source, cells[c], c, as_text, label=c == label) for c in columns}
    try:
        return datasets.Dataset.from_dict(typed)
    except UnicodeError as error:
        raise ValueError(f"{source} holds text that is not Unicode: {error}") from None


def _check_names(names: Sequence[str], columns: Sequence[str], where: str) -> None:
    missing = [column for column in columns if column not in names]
    if missing:
        known = ", ".join(name if name == name.strip() and name else repr(name) for name in names)
        raise ValueError(
            f"{where} has no column {', '.join(map(repr, missing))}; its columns are {known}{_other_separator(names)}"
        )


def _other_separator(names: Sequence[str]) -> str:
    """That a table of one column seems to be written with another separator, in words."""
    for separator, remedy in ((";", "save it with commas"), ("\t", "name it .tsv"), (",", "name it .csv")):
        if len(names) == 1 and separator in names[0]:
            return f"; the separator looks like {separator!r}: {remedy}"
    return ""


def _check_columns(rows: Any, columns: Sequence[str], where: str) -> None:
    import pyarrow.compute as pc

    _check_names(rows.column_names, columns, where)
    for column in columns:
        cells = rows.data.column(column)  # of a table without an order of rows of its own
        empty = cells.null_count
        if str(getattr(rows.features[column], "dtype", "")).startswith(("float", "double")):
            empty += pc.sum(pc.is_nan(cells)).as_py() or 0
        if empty:
            raise ValueError(
                f"column '{column}' of {where} is empty in {empty} rows; fill it in, or leave these rows out"
            )


def notes_on_files(data: Data, split: str) -> list[str]:
    """The tables of a folder that are not read, as `datasets` reads those of one format alone, in words."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    folder, source = Path(data.path or "").expanduser(), _named(data, split)
    if data.path is None or is_file(source) or not folder.is_dir() or (folder / "README.md").exists():
        return []  # a README may say which files are read
    used = _tables_in(folder, data.config)
    found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder)) if used else {}
    left = [
        Path(name).name
        for of_split, files in found.items()
        if str(of_split) in source
        for name in files
        if is_file(name) and name not in used.get(str(of_split), ())
    ]
    return [f"{', '.join(left)} left out, beside files of another format"] if left else []


def notes_on_lines(data: Data, split: str, rows: Any) -> list[str]:
    """How many rows of a csv or tsv file have a cell that spans lines, in words: rows may have been swallowed there."""
    source = _named(data, split)
    path = source if is_file(source) else str(data.path)
    if tables.ending(path) not in (".csv", ".tsv") and not Path(path).expanduser().is_dir():
        return []
    texts = [name for name, feature in rows.features.items() if getattr(feature, "dtype", None) == "string"]
    found = [tables.lines_in_cells(rows[name]) for name in texts]
    count, longest = max((cells for cells, _ in found), default=0), max((lines for _, lines in found), default=0)
    return [f"{count} of {len(rows)} rows have a cell of several lines, the longest of {longest}"] if count else []


def notes_on_sharing(data: Data, split: str) -> list[str]:
    """That the rows of a split are those of one before it, in words; rows held out of train are none of its rows.

    >>> notes_on_sharing(Data("rows.csv", validation=0.2, test="rows.csv"), "test")
    ['it is the train split, rows.csv: its score is of rows that were trained on']
    """
    whose = {"train": "that were trained on", "validation": "that options and checkpoints are chosen by"}
    before = SPLITS[: SPLITS.index(split)] if split in SPLITS else ()
    if split == "validation" and not isinstance(data.validation, str):
        return []
    same = next((other for other in before if _place(data, other) == _place(data, split)), None)
    if same is None:
        return []
    return [f"it is the {same} split, {source_of(data, split)}: its score is of rows {whose[same]}"]


def _place(data: Data, split: str) -> tuple[str, str]:
    """The file or data set of a split, and which part of it, the same however the path is written."""
    source = _named(data, split)
    path, part = (source, "train") if is_file(source) else (str(data.path), source)
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path, part


def source_of(data: Data, split: str) -> str:
    """Names the place of the rows of a split."""
    return _source(data, _named(data, split))


def _named(data: Data, split: str) -> str:
    """The split or file that the rows of a split are taken from."""
    source = (data.test or "test") if split == "test" else getattr(data, split)
    return source if isinstance(source, str) else data.train


def _source(data: Data, split: Any) -> str:
    if isinstance(split, str) and is_file(split):
        return split
    return f"'{split}' of {data.path}" + (f" ({data.config})" if data.config else "")
