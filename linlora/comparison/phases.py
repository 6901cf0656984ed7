"""The comparison on digits as jobs: starts, adapters, fusions, maps. A job that left its files is not done again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from linlora.comparison import digits
from linlora.comparison.controls import CONTROLS, Control, Trained
from linlora.comparison.digits import Settings
from linlora.comparison.settings import START_TITLES, Start
from linlora.formats.export import TASK_VECTOR_FILE
from linlora.quickstart.data import load_digits
from linlora.quickstart.experiment import Experiment
from linlora.quickstart.progress import Costs, WorkBar, image_cost
from linlora.quickstart.tasks import select_tasks
from linlora.quickstart.workers import Crew, Job
from linlora.storage.run_directory import is_whole


def controls_of(start: Start) -> tuple[Control, ...]:
    """At B0 = 0 LoRA-FA is layer scope, and is not computed twice."""
    return tuple(control for control in CONTROLS if start == "warm" or control.key != "lora_fa")


def trained_of(start: Start) -> tuple[Trained, ...]:
    """The kinds of training that the controls of a start need."""
    return tuple(dict.fromkeys(control.trained for control in controls_of(start)))


@dataclass(frozen=True)
class Phase:
    """Jobs of one kind: `function(settings, experiment, *job)` leaves `files` in `directory(experiment, *job)`."""

    done: str
    function: Callable[..., None]
    directory: Callable[..., Path]
    files: tuple[str, ...]


STARTS = Phase("started from", digits.begin, digits.start_directory, (digits.START_FILE,))
ADAPTERS = Phase("trained", digits.train, digits.run_directory, (TASK_VECTOR_FILE, digits.RECORD_FILE))
FUSIONS = Phase("fused", digits.fuse, digits.fused_directory, (digits.SCORES_FILE,))
MAPS = Phase("mapped", digits.measure_map, digits.map_directory, (digits.MAP_FILE,))


def run_phases(
    settings: Settings, experiment: Experiment, seeds: int, crew: Crew, bar: WorkBar[ComparisonCosts]
) -> None:
    """Everything that is missing, seed by seed within a phase; what depends on a job that was done is done again."""
    costs, starts = bar.costs, settings.starts

    def run(phase: Phase, jobs: Sequence[Job], cost: Callable[..., int], again: Collection[Job] = ()) -> set[Job]:
        missing = [j for j in jobs if j in again or not is_whole(phase.directory(experiment, *j), *phase.files)]
        bar.skip(sum(cost(*job) for job in set(jobs) - set(missing)))
        for job in crew(partial(_swapped, phase.function, settings), missing):
            bar.advance(cost(*job))
            bar.now(f"{phase.done} {', '.join(map(_title, job))}")
        return set(missing)

    begun = run(STARTS, [(start, seed) for seed in range(seeds) for start in starts], costs.start)
    adapters = [
        (start, trained, task.name, seed)
        for seed in range(seeds)
        for start in starts
        for task in experiment.tasks
        for trained in trained_of(start)
    ]
    new = run(ADAPTERS, adapters, costs.adapter, [job for job in adapters if (job[0], job[3]) in begun])
    changed = {(start, trained, seed) for start, trained, _, seed in new}
    fusions = [(start, control, seed) for seed in range(seeds) for start in starts for control in controls_of(start)]
    run(FUSIONS, fusions, costs.fusion, [job for job in fusions if (job[0], job[1].trained, job[2]) in changed])
    maps = [(start, control) for start in starts for control in controls_of(start)]
    run(MAPS, maps, costs.map, [job for job in maps if (job[0], job[1].trained, 0) in changed])


def _swapped(function: Callable[..., None], settings: Settings, experiment: Experiment, *job: Any) -> None:
    function(settings, experiment, *job)


def _title(part: Any) -> str:
    if isinstance(part, Control):
        return part.title
    if isinstance(part, int):
        return f"seed {part}"
    return START_TITLES.get(part, str(part))


@dataclass(frozen=True)
class ComparisonCosts:
    """What each job costs, in images through the network, as in the quickstart."""

    settings: Settings
    processes: int

    @property
    def quickstart(self) -> Costs:
        return Costs(self.settings.quickstart, self.processes)

    def start(self, start: Start, seed: int) -> int:
        settings = self.settings
        step = settings.warmup_batch * self._tasks * image_cost("lora", of_step=True)
        return settings.warmup_steps * step if start == "warm" else 0

    def adapter(self, start: Start, trained: Trained, task: str, seed: int) -> int:
        return self.quickstart.fine_tuning("lora" if trained == "lora-fa" else trained)

    def fusion(self, start: Start, control: Control, seed: int) -> int:
        options, indices, family = self.settings.options, load_digits().indices, _family(control)
        searched = sum(len(choices) for m in options.methods if len(choices := options.choices(m, seed)) > 1)
        negations = 2 * self._tasks  # of the largest λ first: about two are tried
        validation = (1 + searched + negations) * len(indices["validation"])
        test = (1 + len(options.methods) + self._tasks) * len(indices["test"])
        few = options.lorahub_budget * options.lorahub_examples
        steps = options.adamerging_steps * len(options.choices("adamerging", seed))
        adamerging = steps * options.adamerging_batch * image_cost(family, of_step=True)
        return self._tasks * (image_cost(family) * (validation + test + few) + adamerging)

    def map(self, start: Start, control: Control) -> int:
        n, validation = len(self.settings.options.map_scalings), len(load_digits().indices["validation"])
        return 2 * n * (n + 1) * validation * image_cost(_family(control))

    def total(self, seeds: int) -> int:
        """The whole run, with pre-training."""
        settings = self.settings
        total = settings.quickstart.pretraining_epochs * self.quickstart.epoch()
        for start in settings.starts:
            adapters = sum(self.adapter(start, trained, "", 0) for trained in trained_of(start))
            fusions = sum(self.fusion(start, control, 0) for control in controls_of(start))
            total += seeds * (self.start(start, 0) + self._tasks * adapters + fusions)
            total += sum(self.map(start, control) for control in controls_of(start))
        return total

    @property
    def _tasks(self) -> int:
        return len(select_tasks(self.settings.quickstart.tasks))


def _family(control: Control) -> Any:
    return "model" if control.trained == "model" else "lora"
