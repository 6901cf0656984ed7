"""The glyphs as data of an experiment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linlora.experiments.image_suite import ImageSuite
from linlora.quickstart.glyphs.heads import head, network
from linlora.quickstart.glyphs.images import tasks
from linlora.quickstart.glyphs.scripts import selected


@dataclass(frozen=True)
class Glyphs:
    """`linlora.experiments.image_suite.ImageData` of printed and handwritten characters; the package brings everything.

    Attributes:
        tasks: some of those of `linlora.quickstart.glyphs.tasks`; all of them for None.
    """

    tasks: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(script.name for script in selected(self.tasks))

    @property
    def files(self) -> tuple[str, ...]:
        return ()

    def prepare(self, folder: Path, device: str) -> None:
        """Nothing: the backbone is part of the package, and drawing the tasks takes less time than reading them."""

    def open(self, folder: Path) -> ImageSuite:
        drawn = tasks(self.tasks)
        splits = {task.name: task.splits for task in drawn}
        return ImageSuite(network(), splits, {task.name: head(task) for task in drawn})
