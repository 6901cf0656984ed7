"""The selectors by the names that `route` takes and files keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linlora.routing.gate import Gate
from linlora.routing.selectors import AdaMix, Poly, Private, Selector, Sizes, Table, Uniform

VARIANTS: dict[str, type[Selector]] = {
    selector.variant: selector for selector in (Poly, Table, Private, Uniform, AdaMix, Gate)
}


def make_selector(described: Mapping[str, Any], variants: Sequence[type[Selector]] = ()) -> Selector:
    """Make the selector of a `Selector.description`; `variants` are classes beside linlora's own.

    >>> make_selector(Uniform(Sizes(n_tasks=1, n_skills=4, n_heads=1, in_features=8)).description())
    Uniform(4 skills in 1 head)
    """
    known = {**VARIANTS, **{variant.variant: variant for variant in variants}}
    if described["variant"] not in known:
        raise ValueError(
            f"unknown selector {described['variant']!r}: known are {', '.join(sorted(known))}; if it is a class of "
            "your own, pass it, variants=[...]"
        )
    return known[described["variant"]](Sizes(**described["sizes"]), **described["options"])
