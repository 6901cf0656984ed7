"""Jobs: each fills a folder, in one of a few worker processes, behind one progress bar.

A job's result is the files it writes, which are whole or absent: a killed run goes on with what is missing, and what a
job computes does not depend on how many processes there are. The processes are joblib's.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from linlora.storage.run_directory import is_whole

Workers = int | str
"""How many processes of this machine, or a Dask cluster, whose workers need one thread each: "dask://HOST:PORT"."""


@dataclass(frozen=True)
class Job:
    """`function()` leaves `files`, JSON or safetensors, in `folder`.

    Attributes:
        title: what is shown when it is done, such as "trained LoRA, seed 0".
        after: the folders of jobs that this one reads; if one of them is done again, so is this.
    """

    title: str
    folder: Path
    files: tuple[str, ...]
    function: Callable[[], Any]
    after: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Done:
    """How many jobs this call did, and how many it found done."""

    made: int
    found: int


def check_workers(workers: Workers) -> None:
    """Raise a ValueError for a number or an address that makes no sense."""
    if isinstance(workers, str):
        if not workers.startswith("dask://"):
            raise ValueError(f"workers: a number of processes, or dask://HOST:PORT, got '{workers}'")
        try:
            import distributed  # noqa: F401
        except ImportError:
            raise ImportError(
                "workers on a Dask cluster need the package distributed: pip install 'linlora[cluster]'"
            ) from None
    elif workers < 1:
        raise ValueError(f"workers has to be 1 or more, got {workers}")


def workers_of(text: str) -> Workers:
    """The workers that a flag names.

    >>> workers_of("2"), workers_of("dask://node1:8786")
    (2, 'dask://node1:8786')
    """
    return int(text) if text.lstrip("-").isdigit() else text


def run_jobs(
    phases: Sequence[Sequence[Job]],
    workers: Workers,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    console: Console | None = None,
    alone: Sequence[Job] = (),
) -> Done:
    """Do the jobs that are missing, one phase after the other; those of a phase in any order.

    Args:
        workers: 1 does them in this process. Workers of a cluster see the folders under the same paths.
        around: what each job runs in, in whatever process.
        alone: jobs to do in this process in the end, when the workers are gone.
    """
    missing = _missing([*phases, alone])
    made = sum(map(len, missing))
    with _progress(console or Console(quiet=True)) as progress:
        bar = progress.add_task("starting", total=made)

        def do(parallel: Parallel, jobs: Sequence[Job]) -> None:
            for job in parallel(delayed(_do)(job, around, os.getpid()) for job in jobs):
                progress.update(bar, advance=1, description=job.title)
                if not progress.console.is_terminal:  # a log file shows the bar only when it is done
                    progress.console.print(job.title, highlight=False)

        with _parallel(workers) as parallel:
            for jobs in missing[:-1]:
                do(parallel, jobs)
        with _parallel(1) as parallel:
            do(parallel, missing[-1])
        progress.update(bar, description="done")
    return Done(made, found=sum(map(len, phases)) + len(alone) - made)


def _missing(phases: Sequence[Sequence[Job]]) -> list[list[Job]]:
    """The jobs to do, by phase: those whose files are not whole, and those that read what is done again.

    Their files are deleted, or the run that goes on after an interruption would take them for results of this one.
    """
    missing: list[list[Job]] = []
    again: set[Path] = set()
    for phase in phases:
        missing.append([job for job in phase if again & set(job.after) or not is_whole(job.folder, *job.files)])
        again |= {job.folder for job in missing[-1]}
    for job in itertools.chain(*missing):
        for file in job.files:
            (job.folder / file).unlink(missing_ok=True)
    return missing


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, speed_estimate_period=120,
    )  # fmt: skip


@contextmanager
def _parallel(workers: Workers) -> Iterator[Parallel]:
    """joblib's Parallel, whose results come as they are ready. On Ctrl-C the jobs in work are not waited for."""
    options: dict[str, Any] = {"return_as": "generator_unordered", "batch_size": 1}
    if isinstance(workers, str):
        from distributed import Client

        with Client(workers.replace("dask://", "tcp://", 1)), parallel_config("dask"):
            yield Parallel(**options)
        return
    try:
        yield Parallel(n_jobs=workers, backend="loky", **options)
    except BaseException:
        if workers > 1:
            get_reusable_executor().shutdown(wait=True, kill_workers=True)
        raise
    if workers > 1:  # nothing may compete with what is timed afterwards
        get_reusable_executor().shutdown(wait=True)


_one_job = threading.Lock()  # a process has one seed and one number of threads; a worker of a cluster runs several


def _do(job: Job, around: Callable[[], AbstractContextManager[Any]], main: int) -> Job:
    if os.getpid() != main:
        _work_for(main)
    with _one_job, around():
        job.function()
    return job


_watching: set[int] = set()  # of a worker: the processes it works for


def _work_for(main: int) -> None:
    """In a worker: a Ctrl-C is for the main process, which ends its workers; a worker outlives it by a second."""
    of_cluster = os.getppid() != main or threading.current_thread() is not threading.main_thread()
    if main in _watching or of_cluster:  # whose workers have a life of their own
        return
    _watching.add(main)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: int) -> None:
    while os.getppid() == main:
        time.sleep(1.0)
    os._exit(1)
