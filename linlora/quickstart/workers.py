"""Worker processes: independent jobs (train an adapter, fuse a family) run several at a time, one thread each.

A job is a function of the experiment and of a few plain arguments, and its result is the files it writes. So the
processes share nothing but the run directory, and what a job computes does not depend on how many there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

from linlora.quickstart.surroundings import surroundings

Job = tuple[Any, ...]


class Shared(Protocol):
    """An experiment that every process has: where it computes, and how another process opens it."""

    @property
    def device(self) -> str: ...

    @property
    def threads(self) -> int: ...

    @property
    def reopen(self) -> Callable[[], Shared]: ...


class Crew(Protocol):
    """Does `function(experiment, *job)` for every job; yields each job when it is done, in any order."""

    def __call__(self, function: Callable[..., None], jobs: Sequence[Job]) -> Iterator[Job]: ...


@contextmanager
def crew_of(processes: int, experiment: Shared) -> Iterator[Crew]:
    """A crew of worker processes; of this process alone for one. They start when there is a job, not before."""
    if processes == 1:
        yield partial(_do_here, experiment)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    alive, held = context.Pipe(duplex=False)
    with alive, held, ProcessPoolExecutor(processes, context, _start, (alive, experiment.reopen)) as pool:
        try:
            yield partial(_do_in_workers, pool)
        except BaseException:  # Ctrl-C too: do not wait for the jobs in work
            held.close()
            raise


def _do_here(experiment: Shared, function: Callable[..., None], jobs: Sequence[Job]) -> Iterator[Job]:
    for job in jobs:
        function(experiment, *job)
        yield job


def _do_in_workers(pool: ProcessPoolExecutor, function: Callable[..., None], jobs: Sequence[Job]) -> Iterator[Job]:
    futures = {pool.submit(_do, function, job): job for job in jobs}
    for future in as_completed(futures):
        future.result()
        yield futures[future]


_experiment: Shared  # of a worker


def _start(alive: Connection, reopen: Callable[[], Shared]) -> None:
    """The first thing a worker does. A Ctrl-C in the terminal is for the main process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main_process, args=(alive,), daemon=True).start()
    global _experiment
    _experiment = reopen()


def _end_with_main_process(alive: Connection) -> None:
    """The main process holds the other end of the pipe and never writes: it closed it, or was killed."""
    alive.poll(None)
    os._exit(1)


def _do(function: Callable[..., None], job: Job) -> None:
    with surroundings(_experiment.device, _experiment.threads):
        function(_experiment, *job)
