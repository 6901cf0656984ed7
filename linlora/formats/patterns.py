"""`rank_pattern` and `alpha_pattern` of an adapter, matched as PEFT matches them, whoever wrote them.

They are regular expressions, and one can be made to take longer than anyone waits. Literal names, which nearly all are,
are looked up; expressions that repeat nothing are matched by `re`; the others by `regex`, which has a time limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import regex

from linlora.storage.files import CorruptFileError

_LONGEST = 10_000
_OF_ONE_MATCH, _OF_ALL = 0.05, 5.0
"""Seconds of the processor. A match that is meant takes microseconds."""
_LITERAL = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\[^A-Za-z0-9])+")
_REPEATS = re.compile(r"[*+?{|(]")

V = TypeVar("V")


class Patterns(Generic[V]):
    """The values of a pattern table, by layer. Raises CorruptFileError for a key that is no expression, or endless.

    >>> patterns = Patterns({"^encoder.q": 4, "q|v": 16}, "adapter_config.json: rank_pattern")
    >>> [patterns.get(layer, 8) for layer in ("encoder.q", "decoder.encoder.q", "encoder.qv")]
    [4, 16, 8]
    """

    def __init__(self, values: Mapping[str, V], where: str) -> None:
        self.values, self.where = values, where
        self.keys = list(values)
        self.literals: dict[tuple[str, bool], int] = {}
        self.expressions: list[tuple[int, Any]] = []
        self.spent = 0.0
        for place, key in enumerate(self.keys):
            if _LITERAL.fullmatch(key):
                text = re.sub(r"\\(.)", r"\1", key.removeprefix("^"), flags=re.DOTALL)
                self.literals.setdefault((text, key.startswith("^")), place)
            else:
                self.expressions.append((place, self._compiled(key)))

    def get(self, layer: str, default: V) -> V:
        """The value of the first pattern that a layer's name, or its end behind a dot, matches in full."""
        ends = [layer[place + 1 :] for place in range(len(layer)) if layer[place] == "."]
        candidates = [(layer, True), (layer, False), *((end, False) for end in ends)]
        first = min((self.literals[end] for end in candidates if end in self.literals), default=len(self.keys))
        for place, expression in self.expressions:
            if place > first:
                break
            if self._matches(expression, layer, self.keys[place]):
                return self.values[self.keys[place]]
        return self.values[self.keys[first]] if first < len(self.keys) else self.values.get(layer, default)

    def _compiled(self, key: str) -> Any:
        if len(key) > _LONGEST:
            raise CorruptFileError(f"{self.where}: a pattern of {len(key):,} characters; {_LONGEST:,} are read")
        expression = rf"(.*\.)?({key})$"  # PEFT's
        try:
            compiled = re.compile(expression)
            return regex.compile(expression) if _REPEATS.search(key) else compiled
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise CorruptFileError(f"{self.where}: {key[:80]!r} is no regular expression ({error})") from error

    def _matches(self, expression: Any, layer: str, key: str) -> bool:
        if isinstance(expression, re.Pattern):
            return expression.match(layer) is not None
        start = time.process_time()
        try:
            found = expression.match(layer, timeout=_OF_ONE_MATCH) is not None
            self.spent += time.process_time() - start
        except TimeoutError:
            self.spent = _OF_ALL
        if self.spent >= _OF_ALL:
            raise CorruptFileError(
                f"{self.where}: the pattern {key[:80]!r} takes too long on layer '{layer[:80]}'; write the layers' "
                "names in its place"
            )
        return found
