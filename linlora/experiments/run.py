"""`run`: an experiment from its settings to its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

import linlora
from linlora.experiments.experiment import Experiment
from linlora.experiments.jobs import Job, Workers, check_workers, run_jobs
from linlora.experiments.report import write_report
from linlora.experiments.results import collect
from linlora.experiments.step_time import FILE as STEP_TIME_FILE
from linlora.storage.environment import environment
from linlora.storage.run_directory import only_run_in, open_run_directory, read_json


def run(
    experiment: Experiment,
    job: str,
    seeds: int = 3,
    workers: Workers = 2,
    fresh: bool = False,
    console: Console | None = None,
    alone: Sequence[Job] = (),
) -> dict[str, Any]:
    """Do all jobs of an experiment that are missing in its run directory; print, draw and write the report.

    Args:
        job: what the run directory belongs to, such as "quickstart".
        seeds: how many; each trains adapters of its own.
        workers: how many jobs at a time; the results do not depend on it. With more than 1, a script has to call this
            under `if __name__ == "__main__":`, as always where processes are spawned. "dask://HOST:PORT" runs them on
            a Dask cluster that shares the file system.
        fresh: start over.
        alone: jobs to do in this process, when the workers are gone.

    Returns: what `results.json` holds.

    Raises:
        DifferentSettingsError: the directory holds a run of other settings. FileExistsError: it holds something else,
            or another process is working in it.
        ValueError: fewer than one seed or process.
    """
    console, begin = console or Console(), time.perf_counter()
    with opened(experiment.out, experiment.fingerprint(), job, seeds, workers, fresh) as stack:
        stack.enter_context(experiment.around())
        done = run_jobs(experiment.phases(seeds), workers, experiment.around, console, alone)
        results = {
            "environment": {
                **environment(experiment.device),
                "backend": linlora.explain("linearized_lora_linear", experiment.device).backend,
            },
            "settings": experiment.fingerprint(),
            **collect(experiment, seeds),
            "step_time": read_json(experiment.out / STEP_TIME_FILE) if alone else None,
            "wall_seconds": time.perf_counter() - begin,
            "workers": workers,
            "jobs": {"made": done.made, "found": done.found},
        }
        write_report(results, experiment.out, console)
    return results


def opened(out: Path, fingerprint: dict[str, Any], job: str, seeds: int, workers: Workers, fresh: bool) -> ExitStack:
    """Open a run directory, and keep other processes out of it until the stack is closed."""
    if seeds < 1:
        raise ValueError(f"seeds has to be 1 or more, got {seeds}")
    check_workers(workers)
    open_run_directory(out, fingerprint, fresh, job)
    stack = ExitStack()
    stack.enter_context(only_run_in(out))
    return stack
