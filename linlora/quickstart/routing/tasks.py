"""The tasks: every question about the digit in every domain; one question of each domain is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from linlora.quickstart.digits import tasks as digits

DOMAINS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "rotated": digits.rotated,
    "inverted": digits.inverted,
    "mirrored": digits.mirrored,
    "transposed": digits.transposed,
    "shifted": digits.shifted,
    "upside-down": digits.upside_down,
}
QUESTIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], int]] = {  # labels of digits, and how many there are
    "digit": (digits.which_digit, 10),
    "odd": (digits.is_odd, 2),
    "five-or-more": (digits.is_five_or_more, 2),
    "loop": (digits.is_one_of(0, 6, 8, 9), 2),
    "prime": (digits.is_one_of(2, 3, 5, 7), 2),
}


@dataclass(frozen=True)
class Pair:
    """A task: a question asked in a domain."""

    domain: str
    question: str

    def __str__(self) -> str:
        return f"{self.domain}-{self.question}"


def divide(domains: Sequence[str], questions: Sequence[str]) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """The tasks to train on and those held out: of the i-th domain the i-th question, in turns.

    >>> trained, held_out = divide(list(DOMAINS), list(QUESTIONS))
    >>> len(trained), [str(pair) for pair in held_out[:2]]
    (24, ['rotated-digit', 'inverted-odd'])
    """
    unknown = [name for name in domains if name not in DOMAINS] + [name for name in questions if name not in QUESTIONS]
    if unknown or len(domains) < 1 or len(questions) < 2:
        raise ValueError(
            f"no domain or question {unknown}: choose domains of {list(DOMAINS)} and at least two of {list(QUESTIONS)}"
        )
    held_out = [Pair(domain, questions[i % len(questions)]) for i, domain in enumerate(domains)]
    every = [Pair(domain, question) for domain in domains for question in questions]
    return tuple(pair for pair in every if pair not in held_out), tuple(held_out)
