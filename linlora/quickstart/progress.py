"""One progress bar for the whole run, and what the phases cost: in images through the network, so that the time left
is an honest guess."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from linlora.quickstart.data import load_digits
from linlora.quickstart.settings import FAMILIES, Family, Settings
from linlora.quickstart.tasks import select_tasks

# Measured with the default settings, where evaluating an image with a plain model is 1.
_IMAGE = {"lora": 1, "layer": 1, "model": 3}
_IMAGE_OF_STEP = {"lora": 4, "layer": 4, "model": 5, "layer_torch_func": 12, "model_torch_func": 12}

C = TypeVar("C")


@dataclass(frozen=True)
class Costs:
    """What each phase costs. Work that one process does while the others wait counts for all of them."""

    settings: Settings
    processes: int

    def epoch(self) -> int:
        """One epoch of pre-training."""
        return self.processes * _IMAGE_OF_STEP["lora"] * len(load_digits().indices["train"])

    def fine_tuning(self, family: Family) -> int:
        """One adapter."""
        return _IMAGE_OF_STEP[family] * self.settings.steps * self.settings.batch

    def fusion(self, family: Family) -> int:
        """One family and seed: the validation split for each scaling of the grid, the test split for three."""
        indices, tasks = load_digits().indices, len(select_tasks(self.settings.tasks))
        images = len(self.settings.scalings) * len(indices["validation"]) + 3 * len(indices["test"])
        return _IMAGE[family] * tasks * images

    def timed_step(self, version: str) -> int:
        return self.processes * _IMAGE_OF_STEP[version] * self.settings.batch

    def step_time(self) -> int:
        return self.settings.timed_steps * sum(self.timed_step(version) for version in _IMAGE_OF_STEP)

    def total(self, seeds: int) -> int:
        """The whole run."""
        tasks = len(select_tasks(self.settings.tasks))
        of_seed = sum(tasks * self.fine_tuning(family) + self.fusion(family) for family in FAMILIES)
        return self.settings.pretraining_epochs * self.epoch() + seeds * of_seed + self.step_time()


def image_cost(version: str, of_step: bool = False) -> int:
    """An image through a model of a family: evaluated, or in a training step."""
    return (_IMAGE_OF_STEP if of_step else _IMAGE)[version]


class WorkBar(Generic[C]):
    """Counts work done. What is found done is taken off the total, so that it does not count as speed."""

    def __init__(self, progress: Progress, costs: C, total: int) -> None:
        self.costs = costs
        self._progress = progress
        self._task = progress.add_task("starting", total=total)

    def now(self, description: str) -> None:
        self._progress.update(self._task, description=description)
        if not self._progress.console.is_terminal:  # in a log file the bar shows only when it is done
            self._progress.console.print(description, highlight=False)

    def advance(self, cost: int) -> None:
        self._progress.advance(self._task, cost)

    def skip(self, cost: int) -> None:
        total = self._progress.tasks[self._task].total or 0
        self._progress.update(self._task, total=total - cost)


@contextmanager
def work_bar(console: Console, costs: C, total: int) -> Iterator[WorkBar[C]]:
    """A bar of some total of what `costs` counts; `costs` is for those who advance it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, speed_estimate_period=60) as progress:
        bar = WorkBar(progress, costs, total)
        yield bar
        bar.now("done")
