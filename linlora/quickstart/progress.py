"""One progress bar for the whole run: its unit is an image through the network, so the time left is an honest guess."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

STEP_COST = 3  # a training step costs about three forwards: one forward, a backward of two


class WorkBar:
    """Counts images through the network. Work found done is taken off the total, so that it does not count as speed."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=total)

    def now(self, description: str) -> None:
        self._progress.update(self._task, description=description)
        if not self._progress.console.is_terminal:  # in a log file the bar shows only when it is done
            self._progress.console.print(description, highlight=False)

    def advance(self, images: int) -> None:
        self._progress.advance(self._task, images)

    def skip(self, images: int) -> None:
        total = self._progress.tasks[self._task].total or 0
        self._progress.update(self._task, total=total - images)


@contextmanager
def work_bar(console: Console, total: int) -> Iterator[WorkBar]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, speed_estimate_period=60) as progress:
        bar = WorkBar(progress, total)
        yield bar
        bar.now("done")
