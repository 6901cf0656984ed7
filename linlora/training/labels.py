"""The classes of a label column: their names, and the index a row's value stands for."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Classes:
    """The classes of one column.

    Attributes:
        names: one for each class.
        values: what stands in the column for each class.

    >>> classes = Classes(("negative", "positive"), ("neg", "pos"), "label")
    >>> classes.index("pos")
    1
    >>> classes.index("neutral")
    Traceback (most recent call last):
    ValueError: column 'label' holds 'neutral', which is none of the classes of the train split: 'neg', 'pos'
    """

    names: tuple[str, ...]
    values: tuple[Any, ...]
    column: str

    def index(self, value: Any) -> int:
        """The class of a value: of the one that is equal to it, else of the one that is written alike (1 and "1")."""
        for key in (value, str(value)):
            if isinstance(key, Hashable) and key in self._indices:
                return self._indices[key]
        if value in (-1, None):
            raise ValueError(
                f"column '{self.column}' holds {value!r}, as it does where labels are withheld; choose another split"
            )
        values = ", ".join(map(repr, self.values[:20])) + (", ..." if len(self.values) > 20 else "")
        raise ValueError(
            f"column '{self.column}' holds {value!r}, which is none of the classes of the train split: {values}"
        )

    def ordered_as(self, names: Sequence[str]) -> Classes:
        """The same classes in the order of other names for them, which differ by case and "_" alone; else as they are.

        >>> Classes(("negative", "positive"), (0, 1), "label").ordered_as(["POSITIVE", "NEGATIVE"]).values
        (1, 0)
        """
        places = {_plain(name): place for place, name in enumerate(self.names)}
        order = [places.get(_plain(name), -1) for name in names]
        if sorted(order) != list(range(len(self.names))):
            return self
        return Classes(tuple(self.names[i] for i in order), tuple(self.values[i] for i in order), self.column)

    @functools.cached_property
    def _indices(self) -> dict[Any, int]:
        written = {str(value): i for i, value in enumerate(self.values)}
        return {**written, **{value: i for i, value in enumerate(self.values)}}


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ")


def numbered_as(train: Any, rows: Any, column: str) -> Any:
    """The rows of a split, their named classes numbered as in the train split: each file numbers its own."""
    from datasets import ClassLabel

    wanted, own = train.features[column], rows.features[column]
    if not (isinstance(wanted, ClassLabel) and isinstance(own, ClassLabel)) or own.names == wanted.names:
        return rows
    known = Classes(tuple(wanted.names), tuple(wanted.names), column)
    withheld = {-1: -1, None: None}
    numbers = withheld | {i: known.index(own.int2str(i)) for i in distinct(rows, column) if i not in withheld}
    labels = [numbers[label] for label in rows[column]]
    return rows.remove_columns(column).add_column(column, labels).cast_column(column, wanted)


def check_labels(rows: Any, column: str) -> None:
    """Raise a ValueError for a column of lists, objects or images: a row has one label."""
    from datasets import ClassLabel, Value

    feature = rows.features[column]
    if not isinstance(feature, (ClassLabel, Value)):
        example = repr(rows[0][column])
        raise ValueError(
            f"column '{column}' holds {type(rows[0][column]).__name__} values, as in row 1, "
            f"{example if len(example) <= 60 else example[:57] + '...'}; a label is one word or number"
        )


def distinct(rows: Any, column: str) -> list[Any]:
    """The values of a column, each once, in the order of the rows."""
    return list(dict.fromkeys(rows[column]))


def is_number(rows: Any, column: str) -> bool:
    """Whether a column of a data set holds numbers with a fraction (also 1.0), to be predicted as such."""
    return str(getattr(rows.features[column], "dtype", "")).startswith(("float", "double"))


def classes_of(rows: Any, column: str, names: Sequence[str] = ()) -> Classes:
    """The classes of a column: those it is declared with, or the values it holds, sorted.

    `names` go before the names that follow from the column; there has to be one for each class. Where they are given,
    the numbers 0.0, 1.0, ... are classes too.
    """
    from datasets import ClassLabel

    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        values: tuple[Any, ...] = tuple(range(feature.num_classes))
        own = tuple(feature.names)
    else:
        values = _values(rows, column, names)
        own = tuple(str(value) for value in values)
    if names and len(names) != len(values):
        raise ValueError(f"{len(names)} names were given for the {len(values)} classes of column '{column}'")
    if len(values) < 2:
        raise ValueError(
            f"column '{column}' holds the one value {values[0]!r} in the train split; classes are two or more"
        )
    return Classes(tuple(names) or own, values, column)


def _values(rows: Any, column: str, names: Sequence[str]) -> tuple[Any, ...]:
    found = distinct(rows, column)
    if None in found:
        raise ValueError(f"column '{column}' is empty in some rows of the train split")
    if names:
        found = [int(value) if isinstance(value, float) and value.is_integer() else value for value in found]
    odd = [value for value in found if not isinstance(value, (str, bool, int)) or value == ""]
    if odd:
        raise ValueError(f"column '{column}' holds {odd[0]!r}; a class is a word or a whole number")
    _refuse_alike(found, column)
    if names and all(isinstance(value, str) for value in found) and set(found) <= set(names):
        return tuple(names)  # texts that are the names themselves
    if names and all(isinstance(value, int) for value in found) and set(found) <= set(range(len(names))):
        return tuple(range(len(names)))  # a small train split need not hold every class
    return tuple(sorted(found))


def _refuse_alike(found: Sequence[Any], column: str) -> None:
    """Raise a ValueError for words that differ by the white space around them."""
    seen: dict[str, str] = {}
    for value in found:
        other = seen.setdefault(str(value).strip(), str(value))
        if other != str(value):
            raise ValueError(f"column '{column}' holds {other!r} and {value!r}, which differ by white space alone")


def number_of(value: Any, column: str) -> float:
    """A label that is a number. Raises ValueError for infinity and NaN."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"column '{column}' holds {value!r}, and its labels are numbers")
    return float(value)
