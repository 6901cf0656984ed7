"""The classes of a label column: their names, and the index a row's value stands for."""

from __future__ import annotations

from collections.abc import Sequence
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
        try:
            return self.values.index(value)
        except ValueError:
            pass
        if value in (-1, None):
            raise ValueError(
                f"column '{self.column}' holds {value!r}, as it does where labels are withheld; choose another split"
            )
        values = ", ".join(map(repr, self.values[:20])) + (", ..." if len(self.values) > 20 else "")
        raise ValueError(
            f"column '{self.column}' holds {value!r}, which is none of the classes of the train split: {values}"
        )


def is_number(rows: Any, column: str) -> bool:
    """Whether a column of a data set holds numbers with a fraction, to be predicted as such."""
    return str(getattr(rows.features[column], "dtype", "")).startswith(("float", "double"))


def classes_of(rows: Any, column: str, names: Sequence[str] = ()) -> Classes:
    """The classes of a column: those it is declared with, or the values it holds, sorted.

    `names` go before the names that follow from the column; there has to be one for each class.
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
    found = rows.unique(column)
    if None in found:
        raise ValueError(f"column '{column}' is empty in some rows of the train split")
    odd = [value for value in found if not isinstance(value, (str, bool, int))]
    if odd:
        raise ValueError(f"column '{column}' holds {odd[0]!r}; a class is a word or a whole number")
    if names and all(isinstance(value, str) for value in found) and set(found) <= set(names):
        return tuple(names)  # texts that are the names themselves
    if names and all(isinstance(value, int) for value in found) and set(found) <= set(range(len(names))):
        return tuple(range(len(names)))  # a small train split need not hold every class
    return tuple(sorted(found))
