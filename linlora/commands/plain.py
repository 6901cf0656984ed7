"""Help that names types in plain words: `text`, `number` and `path`, and nothing for a switch."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperOption

_WORDS = {"str": "text", "int": "number", "float": "number", "Path": "path", "bool": ""}


class PlainCommand(TyperCommand):
    """A command whose options say what they take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in self.params:
            described = getattr(option, "type_descriptor", None)  # of the versions of typer that have one
            if isinstance(option, TyperOption) and option.metavar is None and described is not None:
                option.metavar = in_words(described.annotation)


def in_words(annotation: Any) -> str | None:
    """A type in plain words; None where there are none.

    >>> in_words(list[str]), in_words(int), in_words(bool), in_words(dict)
    ('text', 'number', '', None)
    """
    of = getattr(annotation, "__args__", (annotation,))[0]
    return _WORDS.get(getattr(of, "__name__", ""))
