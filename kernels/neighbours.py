"""Neighbours of a row of the table: a number of it changed, or two. `linlora tune` times them beside the row.

A change has a name, such as "num_stages+1", and every launch of a call can have the same one: `changed` gives the
configuration of each. A row that has no room for a change, in shared memory or in registers, stays as it is. The room
is estimated from the tiles, so a neighbour can still fail to compile: then it is left out where it is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .configs import SHARED_LIMIT, Config

_MORE, _FEWER, _DOUBLE, _HALF = (lambda n: n + 1), (lambda n: n - 1), (lambda n: n * 2), (lambda n: n // 2)

CHANGES: dict[str, dict[str, Callable[[int], int]]] = {
    "num_stages+1": {"num_stages": _MORE},
    "num_stages-1": {"num_stages": _FEWER},
    "block_n*2": {"block_n": _DOUBLE},
    "block_n/2": {"block_n": _HALF},
    "num_warps*2": {"num_warps": _DOUBLE},
    "num_warps/2": {"num_warps": _HALF},
    "halves": {"block_m": _HALF, "num_warps": _HALF},
    "group_m/2": {"group_m": _HALF},
}
"""The changes by name: fields of a configuration, and what becomes of them. With "halves" two programs of half the rows
fit where one did: while one of them waits for its product, the other computes."""

_PRODUCTS = ("recompute", "flags", "tiles", "online")
_ACCUMULATORS = 160  # registers of a thread, of the 255 that it can name

_LIMITS = {"num_stages": (2, 6), "block_m": (64, 128), "block_n": (16, 256), "num_warps": (4, 8), "group_m": (2, 16)}


@functools.cache
def changed(config: Config, change: str, itemsize: int, architecture: int) -> Config:
    """A configuration with a change, for elements of `itemsize` bytes; as it is where there is no room for the change,
    and for the change "", which is none.

    >>> row = Config("tiles", 64, 128, 64, 0, num_warps=4, num_stages=3)
    >>> changed(row, "block_n/2", 2, 90).block_n, changed(row, "num_warps/2", 2, 90) == row
    (64, True)
    """
    if not change:
        return config
    fields: dict[str, Any] = {field: of(getattr(config, field)) for field, of in CHANGES[change].items()}
    new = replace(config, **fields)
    is_one = all(_LIMITS[field][0] <= getattr(new, field) <= _LIMITS[field][1] for field in CHANGES[change])
    has_room = _shared_bytes(new, itemsize) <= SHARED_LIMIT[architecture] and _accumulators(new) <= _ACCUMULATORS
    return new if is_one and has_room and all(_has_effect(config, field) for field in CHANGES[change]) else config


def neighbours(config: Config, itemsize: int, architecture: int) -> dict[str, Config]:
    """The neighbours of a configuration by the change that makes them, six at most."""
    by_change = {change: changed(config, change, itemsize, architecture) for change in CHANGES}
    return dict(list({change: new for change, new in by_change.items() if new != config}.items())[:6])


def _has_effect(config: Config, field: str) -> bool:
    """Whether a field matters to the design. Tiles of 16 rows are one row of tiles, without groups; of "flags" one
    program runs on a multiprocessor, whatever its size."""
    if config.design not in _PRODUCTS:
        return False
    if field == "group_m":
        return config.design != "online" and config.block_m > 16
    return field != "block_m" or config.design != "flags"


def _shared_bytes(config: Config, itemsize: int) -> int:
    """Of the tiles that every stage holds: of x and W, or of keys and values with their tangents."""
    if config.design == "online":
        elements = 2 * config.block_n * (config.block_k + config.block_r)
    else:
        elements = (config.block_m + config.block_n) * config.block_k
    return elements * itemsize * config.num_stages


def _accumulators(config: Config) -> int:
    """Registers of a thread for the sums: of y, u and c, or of o, o_t, S and S_t."""
    if config.design == "online":
        columns = 2 * (config.block_r + config.block_n)
    else:
        columns = config.block_n + (2 * config.block_r if config.design == "recompute" else 0)
    return config.block_m * columns // (32 * config.num_warps)
