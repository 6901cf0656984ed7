"""The values a setting takes: from a field's annotation follow its check, its message and the type of its flag.

    @dataclass(frozen=True)
    class Settings:
        seed: Annotated[int, whole(0)] = 0

        def __post_init__(self):
            check(self)              # Settings("one"): ValueError: seed is a whole number, 0 or more, got 'one'

What a setting means is said once, in the section "Attributes:" of its class: `explained` reads it for help texts.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

_LISTED = 30  # keys that a message names


@dataclass(frozen=True)
class Values:
    """The values of a setting.

    Attributes:
        words: their name in a message.
        takes: whether a value is one of them.
        flag: the type of a flag that gives one.
        read: what the setting holds for a value, the same however it was written.

    >>> whole(1).checked("lora.r", 0)
    Traceback (most recent call last):
    ValueError: lora.r is a whole number, 1 or more, got 0
    """

    words: str
    takes: Callable[[Any], bool]
    flag: Any = str
    read: Callable[[Any], Any] = lambda value: value

    def checked(self, key: str, value: Any) -> Any:
        """What a setting holds for a value. Raises ValueError for one that it does not take."""
        if not self.takes(value):
            raise ValueError(f"{key} is {self.words}, got {value!r}")
        return self.read(value)


def is_real(value: Any) -> bool:
    """Whether a value is a finite number, and neither true nor false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int, below: float = math.inf, more: str = "") -> Values:
    return Values(f"a whole number, {least} or more{more}", lambda v: type(v) is int and least <= v < below, int)


def number(which: str, takes: Callable[[float], bool]) -> Values:
    return Values(f"a number{which}", lambda v: is_real(v) and takes(v), float)


def one_of(*choices: str, unset: tuple[str, ...] = ()) -> Values:
    return Values(f"one of {', '.join(choices)}", (*choices, *unset).__contains__)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value))


TEXT = Values("a text", lambda v: isinstance(v, str))
TEXTS = Values(
    "a list of texts (quote numbers)", _are_texts, list[str], lambda v: (v,) if isinstance(v, str) else tuple(v)
)
SECTION = Values("a section of 'key: value' lines", lambda v: isinstance(v, Mapping), read=dict)


def values_of(kind: type) -> dict[str, Values]:
    """The values that each field of a dataclass takes."""
    return {name: get_args(hint)[1] for name, hint in get_type_hints(kind, include_extras=True).items()}


def check(holder: Any, prefix: str = "") -> None:
    """Check the fields of a frozen dataclass, and have each hold what its value is read as; a default may be None."""
    values = values_of(type(holder))
    for f in fields(holder):
        value = getattr(holder, f.name)
        if value is not None or f.default is not None:
            object.__setattr__(holder, f.name, values[f.name].checked(f"{prefix}{f.name}", value))


def check_keys(where: str, content: Mapping[Any, Any], kind: Any) -> None:
    """Raise a ValueError for a key that is no field of a dataclass."""
    known = [f.name for f in fields(kind) if f.init]
    for key in content:
        if key not in known:
            raise unknown(where, str(key), known, f"{kind.__module__.partition('.')[0]}.{kind.__name__}")


def unknown(where: str, key: str, known: Iterable[str], of: str = "") -> ValueError:
    """The error for a key that is not among the known ones: the nearest of them, else all, or whose fields they are."""
    known = list(known)
    if near := difflib.get_close_matches(key, known, 1):
        hint = f"did you mean '{near[0]}'?"
    elif len(known) <= _LISTED or not of:
        hint = f"the keys are {', '.join(known)}"
    else:
        hint = f"its {len(known)} keys are the fields of {of}, which lists them"
    return ValueError(f"{where}: unknown key '{key}'; {hint}")


def explained(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each field, in one line."""
    section = re.search(r"Attributes:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(kind) or "", flags=re.S)
    entries = re.split(r"^ *(\w+): ", re.sub(r"\n {5,}", " ", section[1] if section else ""), flags=re.M)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2], strict=True)}
