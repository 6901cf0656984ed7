"""Neighbours of a row of the table: one number of it changed. `linlora tune` times them beside the row.

A change has a name, such as "num_stages+1", and every launch of a call can have the same one: `changed` gives the
configuration of each. A row that has no room for a change, in shared memory or in registers, stays as it is. The room
is estimated from the tiles, so a neighbour can still fail to compile: then it is left out where it is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from .configs import SHARED_LIMIT, Config

CHANGES: dict[str, tuple[str, Callable[[int], int]]] = {
    "num_stages+1": ("num_stages", lambda n: n + 1),
    "num_stages-1": ("num_stages", lambda n: n - 1),
    "block_n*2": ("block_n", lambda n: n * 2),
    "block_n/2": ("block_n", lambda n: n // 2),
    "num_warps*2": ("num_warps", lambda n: n * 2),
    "num_warps/2": ("num_warps", lambda n: n // 2),
    "group_m/2": ("group_m", lambda n: n // 2),
}
"""The changes by name: a field of a configuration, and what becomes of it."""

_PRODUCTS = ("recompute", "flags", "tiles")
_ACCUMULATORS = 160  # registers of a thread, of the 255 that it can name

_LIMITS = {"num_stages": (2, 6), "block_n": (16, 256), "num_warps": (4, 8), "group_m": (2, 16)}


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
    field, of = CHANGES[change]
    new = replace(config, **{field: of(getattr(config, field))})  # type: ignore[arg-type]
    least, most = _LIMITS[field]
    has_room = least <= getattr(new, field) <= most and _shared_bytes(new, itemsize) <= SHARED_LIMIT[architecture]
    return new if has_room and _has_effect(config, field) and _accumulators(new) <= _ACCUMULATORS else config


def neighbours(config: Config, itemsize: int, architecture: int) -> dict[str, Config]:
    """The neighbours of a configuration by the change that makes them, six at most."""
    by_change = {change: changed(config, change, itemsize, architecture) for change in CHANGES}
    return {change: new for change, new in by_change.items() if new != config}


def _has_effect(config: Config, field: str) -> bool:
    """Whether the design reads a field. Rows of tiles that are this low are the only ones: they form no groups."""
    if config.design == "online":
        return field != "group_m"
    return config.design in _PRODUCTS and (field != "group_m" or config.block_m > 16)


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
