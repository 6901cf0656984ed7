"""Computes values ahead, in threads, while they are asked for one after the other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_MOST = 4
"""Threads; each holds the value it computes."""
_here = threading.local()


class Ahead(Generic[T]):
    """A function of names that computes the values of the next names while it is called with them in their order.

    As many threads as PyTorch may use, four at most, compute one value each, by one thread of PyTorch; results, errors
    and their order are those of one thread. They start when a name follows the one before; a name out of order is
    computed alone. Kept are the last value and those of a few names ahead.

    >>> squares = Ahead("123", lambda name: int(name) ** 2)
    >>> [squares(name) for name in "1232"]
    [1, 4, 9, 4]
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], T]) -> None:
        names = list(names)
        self._after = dict(itertools.pairwise(names))
        self._make = make
        self._last = threading.local()
        self._lock = threading.Lock()
        self._coming: dict[str, Future[T]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, name: str) -> T:
        last = vars(self._last)
        if last.get("name") != name:
            before = last.pop("name", "")
            last.pop("value", None)  # before the next one is made
            threads = 1 if hasattr(_here, "ahead") else min(_MOST, torch.get_num_threads())
            follows = threads > 1 and self._after.get(before) == name
            last["value"] = self._next(name, threads) if follows else self._alone(name)
            last["name"] = name
        return last["value"]

    def _alone(self, name: str) -> T:
        with self._lock:
            for future in self._coming.values():
                future.cancel()
            self._coming.clear()
        return self._made(name)

    def _next(self, name: str, threads: int) -> T:
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(threads, initializer=setattr, initargs=(_here, "ahead", True))
            following: str | None = name
            for _ in range(threads + 1):
                if following is not None and following not in self._coming:
                    self._coming[following] = self._pool.submit(self._made, following)
                following = self._after.get(following or "")
            future = self._coming.pop(name)
            if name not in self._after:  # the last one
                self._pool.shutdown(wait=False)
                self._pool = None
        return future.result()

    def _made(self, name: str) -> T:
        with one_thread():
            return self._make(name)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of PyTorch's, for work in small pieces: two would wait for each other, long where others run too.

    The number of threads is each thread's own; one that starts takes what was set last, by whomever. Who sets it to one
    here sets it back, so that after all of them threads start with the number from before.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
