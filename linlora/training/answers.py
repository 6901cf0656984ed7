"""Reads the answer in a text that a model wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

UNANSWERED = -1


def normalized(text: str) -> str:
    """Lower case, one space between words, no punctuation around them.

    >>> normalized("  Not  Equivalent. ")
    'not equivalent'
    """
    words = (word.strip("\"'`.,:;!?()[]{}<>*#") for word in text.casefold().split())
    return " ".join(word for word in words if word)


def match(text: str, answers: Sequence[str]) -> int:
    """The index of the answer that a text gives, or UNANSWERED.

    It gives an answer if, case, white space and punctuation aside, it is that answer or begins with its words; of
    answers that begin alike the longest counts. An answer later in the text does not.

    >>> answers = ["equivalent", "not equivalent"]
    >>> match("Not equivalent, because", answers), match(" EQUIVALENT.", answers), match("unsure", answers)
    (1, 0, -1)
    >>> match("equivalently", answers)
    -1
    """
    text = normalized(text)
    best, length = UNANSWERED, 0
    for index, answer in enumerate(map(normalized, answers)):
        if len(answer) > length and (text == answer or text.startswith(f"{answer} ")):
            best, length = index, len(answer)
    return best


_NUMBER = re.compile(r"[-+]?(?:\d+(?:[.,]\d+)?|\.\d+)")


def number(text: str) -> float | None:
    """The first number in a text; None if there is none.

    >>> number("Similarity: 3.5 of 5"), number("4"), number("2,4"), number("very similar")
    (3.5, 4.0, 2.4, None)
    """
    found = _NUMBER.search(text)
    return float(found.group().replace(",", ".")) if found else None
