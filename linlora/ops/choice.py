"""The backend that was asked for, and by whom: every thread and every asyncio task has its own choice.

It is kept three times, because it is asked for from three places:

    ContextVar          eager code, in threads and tasks
    threading.local     code that torch.compile traces: Dynamo guards on its attribute, and cannot read a ContextVar
    torch's own         the threads in which autograd runs backward on a GPU; torch hands them what the thread that
    thread state        called backward() had, so that a layer recomputed there chooses as it did in its forward

Tasks that overlap in one thread with different choices are told apart by eager code only: the other two have the
choice of the block that was opened last, of those that are still open in the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class _Choice:
    """A backend by name, the thread that asked for it, and what is in its way on a device, looked up once."""

    name: str
    thread: int = field(default_factory=threading.get_ident)
    obstacles: dict[torch.device, str | None] = field(default_factory=dict)


class _OfThread(threading.local):
    name: str | None = None

    def __init__(self) -> None:
        self.open: list[_Choice] = []  # by the blocks that are open, which tasks may close in any order
        self.handed: _Choice | None = None  # what the thread was handed before the first of them

    def publish(self) -> None:
        self.name = self.open[-1].name if self.open else None
        torch._C._stash_obj_in_tls(_HANDED_ON, self.open[-1] if self.open else self.handed)


_of_context: ContextVar[_Choice | None] = ContextVar("linlora_backend", default=None)
_of_thread = _OfThread()
_HANDED_ON = "linlora_backend"


@contextmanager
def made(name: str) -> Iterator[None]:
    """Ask for a backend inside the block, in this thread or task alone."""
    previous, choice = _of_context.get(), _Choice(name)
    opened = _of_thread.open
    if not opened:
        _of_thread.handed = _handed()
    _of_context.set(choice)
    opened.append(choice)
    _of_thread.publish()
    try:
        yield
    finally:
        _of_context.set(previous)
        opened.remove(choice)
        _of_thread.publish()


def name() -> str | None:
    """The backend asked for where this is called; None: none was."""
    if torch.compiler.is_compiling():
        return _of_thread.name
    choice = _current()
    return None if choice is None else choice.name


def obstacles() -> dict[torch.device, str | None]:
    """Why the backend asked for cannot run, by device, for its `use_backend` to remember."""
    choice = _current()
    return {} if choice is None else choice.obstacles


def _current() -> _Choice | None:
    choice = _of_context.get()
    if choice is None and torch._C._is_key_in_tls(_HANDED_ON):
        handed = _handed()
        return None if handed is None or handed.thread == threading.get_ident() else handed
    return choice


def _handed() -> _Choice | None:
    return torch._C._get_obj_in_tls(_HANDED_ON) if torch._C._is_key_in_tls(_HANDED_ON) else None
