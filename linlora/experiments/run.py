"""`Experiment`: settings, jobs, a report. `run` does the jobs that a run directory lacks and publishes the report."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

import linlora
from linlora.experiments.environment import surroundings
from linlora.experiments.jobs import Job, Workers, check_workers, run_jobs
from linlora.storage.environment import environment, versions
from linlora.storage.files import write_text
from linlora.storage.run_directory import only_run_in, open_run_directory, write_json

_VERSIONS = ("linlora", "torch", "transformers", "peft")
"""The packages that compute: a run is not continued by others."""


@dataclass(frozen=True)
class Report:
    """What one reads of a finished run.

    Attributes:
        tables: printed, and written to table.txt.
        words: what the tables say, in sentences.
        files: what each file of the run directory holds, by its name.
        markdown: the tables for a README, written to table.md.
    """

    tables: Sequence[Table]
    words: str
    files: Mapping[str, str]
    markdown: str = ""


class Experiment(ABC):
    """What a run directory is filled with. It is pickled to worker processes, where its methods run.

    Attributes:
        out: the run directory.
        device: where it computes.
        op: the op whose backend the results name.
    """

    out: Path
    device: str
    op: ClassVar[str] = "linearized_lora_linear"

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """The settings that a run directory is continued with. More seeds may be added, so they are not in it."""

    @abstractmethod
    def phases(self, seeds: int) -> list[list[Job]]:
        """All jobs; those of a phase read what the phases before it have left."""

    @abstractmethod
    def results(self, seeds: int) -> dict[str, Any]:
        """The numbers of the report, read from what the jobs have left."""

    @abstractmethod
    def report(self, results: dict[str, Any]) -> Report:
        """Draw the pictures of a finished run; its tables and what they say."""

    def around(self) -> AbstractContextManager[Any]:
        """The context of every job; the backend on a GPU is chosen as in training, unless a subclass names one."""
        return surroundings()


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
        DifferentSettingsError: the directory holds a run of other settings, on another device, or by other versions of
            linlora, torch, transformers or PEFT. FileExistsError: it holds something else, or another process is
            working in it.
        ValueError: fewer than one seed or process.
    """
    console, begin = console or Console(), time.perf_counter()
    if seeds < 1:
        raise ValueError(f"seeds has to be 1 or more, got {seeds}")
    check_workers(workers)
    made_by = versions(_VERSIONS) | {"device": experiment.device}
    open_run_directory(experiment.out, made_by | experiment.fingerprint(), fresh, job)
    with only_run_in(experiment.out), experiment.around():
        done = run_jobs(experiment.phases(seeds), workers, experiment.around, console, alone)
        backend = linlora.explain(experiment.op, experiment.device).backend
        results = {
            "environment": environment(experiment.device) | {"backend": backend},
            **experiment.results(seeds),
            "wall_seconds": time.perf_counter() - begin,
            "workers": workers,
            "jobs": asdict(done),
        }
        write_json(experiment.out / "results.json", results)
        _publish(experiment.report(results), experiment.out, results["wall_seconds"], console)
    return results


def _publish(report: Report, out: Path, seconds: float, console: Console) -> None:
    """Write the tables of a run; print them, what they say, and what its files hold."""
    if report.markdown:
        write_text(out / "table.md", report.markdown)
    file = StringIO()
    for place in (console, Console(file=file, width=120)):
        for table in report.tables:
            place.print(table)
        for line in report.words.splitlines():
            place.print(line, highlight=False, markup=False, soft_wrap=line.startswith("  "))  # a command stays whole
    write_text(out / "table.txt", file.getvalue())
    console.print(f"\n{seconds:.0f} s. Written to {out}:", highlight=False, soft_wrap=True)
    for name, what in report.files.items():
        if (out / name).exists():
            console.print(f"  {name:20s} {what}", highlight=False)
