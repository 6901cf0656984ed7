"""Rows of csv, tsv, json and jsonl files (also .gz): every row of the file, every cell as it was written, or an error.

The reading rule:

* Text is UTF-8, with or without a byte order mark; UTF-16 with one. Nothing is guessed.
* A cell is what stands there: "None", "NA", "nan", "-", "007" and "1e5" are text. Empty, and therefore refused by
  `load_split`, are a csv or tsv cell without a character, and a JSON null, NaN or missing key.
* csv: cells may stand in quotation marks, doubled inside; a mark that is not closed, or text behind a closing one, is
  an error with its line. tsv: written so, or with quotation marks as ordinary characters; a file that has other rows
  when read the other way is refused.
* A cell may span lines in csv. A file is refused in which the lines of one read like rows of their own, with a label
  of other rows in the label column: a mark that was not closed has swallowed them. `lines_in_cells` counts the rest.
* Every row has as many cells as the header. Blank lines are none.
* json: a list of objects, or objects one after the other. A key that stands twice in an object is an error.
* A column holds numbers or booleans if each of its cells is written as Python writes them, so that no character is
  lost; the label column also if all its cells are numbers in another writing ("3.50"). All else is text.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linlora.storage.files import without_repeats

ENDINGS = (".csv", ".tsv", ".json", ".jsonl")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_LONGEST_CELL = 2**31 - 1  # characters; Python's own limit is 131,072

Columns = dict[str, list[Any]]


def ending(path: str | Path) -> str:
    """The ending that says how a file is read, ".gz" aside, in lower case."""
    return Path(str(path).removesuffix(".gz")).suffix.lower()


def read_columns(file: Path, columns: Sequence[str], label: str = "") -> tuple[list[str], Columns]:
    """The names of all columns of a file, and the cells of some of them, None where a cell is empty.

    `label` is the name of the label column. Columns that the file lacks are left out. Raises ValueError for a file that
    is not whole, with the line.
    """
    text = _text(file)
    if ending(file) in (".json", ".jsonl"):
        return _of_json(file, text, columns)
    header, *rows = _rows(file, text, ",", csv.QUOTE_MINIMAL) if ending(file) == ".csv" else _tsv_rows(file, text)
    if ending(file) == ".csv" and label in header:
        _refuse_swallowed(file, text, [header, *rows], header.index(label))
    found = {}
    for column in dict.fromkeys(columns):
        if header.count(column) > 1:
            raise ValueError(f"{file} has {header.count(column)} columns '{column}'; give them different names")
        if column in header:
            place = header.index(column)
            found[column] = [row[place] or None for row in rows]
    return header, found


def typed_cells(source: str, cells: list[Any], column: str, as_text: bool, label: bool) -> list[Any]:
    """The cells of a column as values of one type, which `datasets` keeps as they are.

    Args:
        source: the file, for messages.
        as_text: the cells are what stands in a csv or tsv file, whatever it means; those of json have types.
        label: the column is that of the labels.
    """
    kinds = {type(cell) for cell in cells} - {type(None)}
    if kinds <= {str}:
        return _numbers_of(source, cells, column, label) if as_text else cells
    if kinds <= {int} and all(cell is None or -(2**63) <= cell < 2**63 for cell in cells):
        return cells
    if kinds in ({bool}, {float}):
        return cells
    if not label or kinds <= {int}:  # too large for 64 bits: a name
        return [None if cell is None else str(cell) for cell in cells]
    if kinds == {int, float}:
        return [None if cell is None else float(cell) for cell in cells]
    for row, cell in enumerate(cells, 1):
        if isinstance(cell, (list, dict)):
            kind = "a list" if isinstance(cell, list) else "an object"
            raise ValueError(
                f"column '{column}' of {source} holds {kind} in row {row}, {_short(cell)}; a label is one word "
                "or number"
            )
    shown = " and ".join(_short(next(c for c in cells if type(c) is kind)) for kind in sorted(kinds, key=str))
    raise ValueError(f"column '{column}' of {source} holds labels of different kinds, {shown}; write all of them alike")


def _text(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise ValueError(f"{file} could not be unpacked: {error}") from None
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file} is not UTF-8 (byte 0x{content[error.start]:02x} in line {line}); convert it, as in: iconv -f "
            f"WINDOWS-1252 -t UTF-8 {file.name}"
        ) from None


def _tsv_rows(file: Path, text: str) -> list[list[str]]:
    """Read both ways, with quotation marks around cells and without; see the reading rule."""
    readings: list[list[list[str]]] = []
    errors = []
    for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL):
        try:
            readings.append(_rows(file, text, "\t", quoting))
        except ValueError as error:
            errors.append(error)
    if not readings:
        raise errors[0]
    plain, quoted = readings[0], readings[-1]
    if (len(plain), len(plain[0])) != (len(quoted), len(quoted[0])):
        raise ValueError(
            f'{file} has {len(plain) - 1} rows if its quotation marks (") are characters, and {len(quoted) - 1} if '
            "they stand around cells; write it as .csv or .jsonl, where there is one way to read them"
        )
    return quoted if plain is quoted or _written_quoted(plain, quoted) else plain


def _written_quoted(plain: list[list[str]], quoted: list[list[str]]) -> bool:
    """Whether the cells in quotation marks are those that a program puts in them.

    Programs quote each cell; each that is not a number; each with a mark inside (csv writers); or with a comma, too
    (Excel). Where a file quotes others, its marks are part of the text.
    """
    marked = [
        (cell != value, value) for row, values in zip(plain, quoted, strict=True)
        for cell, value in zip(row, values, strict=True)
    ]  # fmt: skip
    programs: tuple[Callable[[str], bool], ...] = (
        lambda value: True,
        lambda value: not _NUMBER.fullmatch(value),
        lambda value: '"' in value,
        lambda value: '"' in value or "," in value,
    )
    return any(all(marks == quotes(value) for marks, value in marked) for quotes in programs)


def _rows(file: Path, text: str, delimiter: str, quoting: int) -> list[list[str]]:
    """The header and the rows, all of one length."""
    rows: list[list[str]] = []
    separator = "a comma" if delimiter == "," else "a tab"
    with _cells_of_any_length():
        lines: Any = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
        begin = 1
        try:
            for row in reader:
                blank = not row or (len(row) == 1 and not row[0].strip() and (not rows or len(rows[0]) > 1))
                if not blank and rows and len(row) != len(rows[0]):
                    raise ValueError(
                        f"{file}, line {begin}: {len(row)} cells, and the header has {len(rows[0])}; a cell with "
                        f"{separator}, a line break or a quotation mark stands in quotation marks"
                    )
                if not blank:
                    rows.append(row)
                begin = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f'{file}, line {begin}: a quotation mark (") opens a cell and is not closed in it ({error}); write "" '
                f"for a mark that is part of a text, and quotation marks around that cell, or use .jsonl"
            ) from None
    if not rows:
        raise ValueError(f"{file} has no data: it is empty")
    return rows


def lines_in_cells(cells: Iterable[Any]) -> tuple[int, int]:
    """How many cells span lines, and the lines of the longest.

    >>> lines_in_cells(["one", "two\\nlines", "a\\r\\nb\\r\\nc"])
    (2, 3)
    """
    counts = [len(_lines(cell)) for cell in cells if isinstance(cell, str)]
    return sum(count > 1 for count in counts), max(counts, default=0)


def _lines(cell: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", cell) if "\n" in cell or "\r" in cell else [cell]


def _refuse_swallowed(file: Path, text: str, rows: list[list[str]], label: int) -> None:
    """Raise a ValueError for a cell whose lines read like rows; see the reading rule. The header is rows[0].

    Where a program has put marks around every cell, none of them is left open.
    """
    known = {row[label] for row in rows[1:] if len(_lines(row[label])) == 1}
    numbers = all(_NUMBER.fullmatch(cell) for cell in known) and any(_FRACTION.search(cell) for cell in known)

    def is_label(cell: str) -> bool:
        return cell in known or bool(numbers and _NUMBER.fullmatch(cell))

    for number, row in enumerate(rows):
        if number and (inner := _swallowed(row, label, is_label)) and not _all_quoted(text, rows):
            raise ValueError(
                f"{file}: row {number} has a cell that spans lines, and one of these reads like the rest of a row, "
                f'{_short(inner)}; if a quotation mark (") was not closed, close it or write "" for a mark that is '
                "part of a text; if the text is meant so, write the file as .jsonl"
            )


def _all_quoted(text: str, rows: list[list[str]]) -> bool:
    written = io.StringIO()
    csv.writer(written, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return written.getvalue().rstrip() == re.sub(r'"\r\n?', '"\n', text).rstrip()


def _swallowed(row: list[str], label: int, is_label: Callable[[str], bool]) -> str | None:
    """The line of a cell that has the cells of a row, from the cell's column, through or to it."""
    for place, cell in enumerate(row):
        lines = _lines(cell)
        for i, line in enumerate(lines if len(lines) > 1 else []):
            first = place if i == 0 else 0
            last = place if i == len(lines) - 1 else len(row) - 1
            if first <= label <= last and last > first:
                cells = line.split(",") if '"' not in line else next(csv.reader([line]), [])
                if len(cells) == last - first + 1 and is_label(cells[label - first]):
                    return line
    return None


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _of_json(file: Path, text: str, columns: Sequence[str]) -> tuple[list[str], Columns]:
    rows = _json_values(file, text)
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f'{file}: row {i} is {_short(row)}, not an object of columns: {{"text": ..., ...}}')
    if not rows:
        raise ValueError(f"{file} has no data: there are no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names, {c: [_present(row.get(c)) for row in rows] for c in dict.fromkeys(columns) if c in names}


def _json_values(file: Path, text: str) -> list[Any]:
    decoder = json.JSONDecoder(object_pairs_hook=without_repeats)
    values, place = [], 0
    try:
        while (place := _SPACE.match(text, place).end()) < len(text):  # type: ignore[union-attr]
            value, place = decoder.raw_decode(text, place)
            values.append(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} could not be read: line {error.lineno} is not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, place) + 1
        raise ValueError(f"{file} could not be read: line {line}: {error}") from None
    return values


_SPACE = re.compile(r"[ \t\r\n]*")


def _present(cell: Any) -> Any:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _numbers_of(source: str, cells: list[str | None], column: str, label: bool) -> list[Any]:
    """Cells of text as numbers or booleans, where that loses no character of them."""
    present = [cell for cell in cells if cell is not None]
    kinds: tuple[Callable[[str], Any], ...] = (int, float, {"True": True, "False": False}.__getitem__)
    for kind in kinds:
        values = {cell: _as_written(kind, cell) for cell in present}
        if None not in values.values():
            return [None if cell is None else values[cell] for cell in cells]
    if label and any(_FRACTION.search(cell) for cell in present if _NUMBER.fullmatch(cell)):
        odd = {cell for cell in present if not _NUMBER.fullmatch(cell)}
        if not odd:
            return [None if cell is None else float(cell) for cell in cells]
        if odd <= _MISSING:
            raise ValueError(
                f"column '{column}' of {source} holds numbers and, in {sum(cell in odd for cell in present)} rows, "
                f"{', '.join(map(repr, sorted(odd)))}; leave these rows out"
            )
    return cells


_FRACTION = re.compile("[.eE]")
_MISSING = {"None", "none", "NONE", "NA", "N/A", "n/a", "na", "nan", "NaN", "NAN", "null", "NULL", "-", "?"}


def _as_written(kind: Callable[[str], Any], cell: str) -> Any:
    """The number or boolean that a text is, if Python writes it so too; None for infinity and beyond 64 bits."""
    try:
        value = kind(cell)
    except (ValueError, KeyError):
        return None
    fits = -(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)
    return value if str(value) == cell and fits else None


def _short(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= 60 else text[:57] + "..."
