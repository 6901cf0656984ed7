"""The comparison on the quickstart's tasks from start to end."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from linlora.comparison import digits
from linlora.comparison.digits import Settings
from linlora.comparison.phases import ComparisonCosts, controls_of, run_phases
from linlora.comparison.results import control_results
from linlora.comparison.settings import START_NOTES, START_TITLES, Start
from linlora.comparison.write import write_report
from linlora.quickstart.experiment import Experiment, prepare
from linlora.quickstart.progress import work_bar
from linlora.quickstart.results import environment
from linlora.quickstart.run import check_device
from linlora.quickstart.surroundings import surroundings
from linlora.quickstart.workers import crew_of
from linlora.storage.run_directory import only_run_in, open_run_directory, read_json


def compare_digits(
    out: str | Path = "runs/compare",
    device: str = "cpu",
    seeds: int = 3,
    fresh: bool = False,
    settings: Settings | None = None,
    console: Console | None = None,
    processes: int = 2,
) -> dict[str, Any]:
    """Compare every control by every fusion method on handwritten digits; print and draw the report.

    A call with the same `out` and settings continues where an interrupted one was. Arguments and errors are those of
    `linlora.quickstart.run`. Returns what `results.json` holds.
    """
    out, settings, console = Path(out), settings or Settings(), console or Console()
    if seeds < 1 or processes < 1:
        raise ValueError(f"seeds and processes have to be 1 or more, got {seeds} and {processes}")
    check_device(device)
    open_run_directory(out, settings.fingerprint(device), fresh, "linlora compare")
    begin = time.perf_counter()
    with only_run_in(out), surroundings(device, settings.quickstart.threads):
        costs = ComparisonCosts(settings, processes)
        with work_bar(console, costs, costs.total(seeds)) as bar:
            bar.now("pre-training")
            epoch = costs.quickstart.epoch()
            experiment = prepare(settings.quickstart, out, device, lambda: bar.advance(epoch), lambda: bar.skip(epoch))
            with crew_of(processes, experiment) as crew:
                run_phases(settings, experiment, seeds, crew, bar)
        results = {
            "environment": environment(device),
            "settings": asdict(settings),
            "seeds": seeds,
            "tasks": [task.name for task in experiment.tasks],
            "starts": {
                start: {
                    "title": START_TITLES[start],
                    "note": START_NOTES[start],
                    "controls": _controls(experiment, start, seeds),
                }
                for start in settings.starts
            },
            "wall_seconds": time.perf_counter() - begin,
            "processes": processes,
        }
        write_report(results, out, console)
    return results


def _controls(experiment: Experiment, start: Start, seeds: int) -> dict[str, Any]:
    found = {}
    for control in controls_of(start):
        single = [
            [
                read_json(
                    digits.run_directory(experiment, start, control.trained, task.name, seed) / digits.RECORD_FILE
                )["test"]
                for task in experiment.tasks
            ]
            for seed in range(seeds)
        ]
        scores = [
            read_json(digits.fused_directory(experiment, start, control, seed) / digits.SCORES_FILE)
            for seed in range(seeds)
        ]
        found[control.key] = {
            **control_results(single, scores),
            "map": read_json(digits.map_directory(experiment, start, control) / digits.MAP_FILE),
        }
    return found
