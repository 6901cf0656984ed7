"""A comparison of controls: adapters of several kinds for several tasks, fused in every way.

begin     the adapter that all of a start and seed set out from
train     an adapter for each start, kind of training, task and seed
fuse      the adapters of a control and seed, by every method
map       the disentanglement of the first two tasks, first seed

Subclasses bring model and data: `images.ImageExperiment` and `recipes.RecipeExperiment`.
"""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from linlora.experiments.controls import CONTROLS, START_TITLES, TRAINED_TITLES, Control, Start, Trained
from linlora.experiments.fusing import fuse_control, map_control
from linlora.experiments.jobs import Job
from linlora.experiments.options import Options
from linlora.experiments.report import report_of
from linlora.experiments.results import control_results
from linlora.experiments.run import Experiment, Report
from linlora.experiments.tasks import Tasks
from linlora.formats.export import export
from linlora.formats.vector_folder import TASK_VECTOR_FILE, save_beside
from linlora.storage.run_directory import read_json, staged, write_json
from linlora.vectors.task_vector import TaskVector

SCORES_FILE, MAP_FILE, STEP_TIME_FILE = "scores.json", "map.json", "step_time.json"


class Comparison(Experiment):
    """Every control by every fusion method, on several tasks.

    Attributes:
        names: the tasks.
        starts: a sentence about each start.
        controls: the keys of the controls that are tried.
        options: what is tried of each fusion method.
        kept: the methods whose fused vectors are written too.
    """

    names: tuple[str, ...]
    starts: Mapping[Start, str]
    controls: tuple[str, ...] = tuple(control.key for control in CONTROLS if control.key != "features")
    options: Options
    kept: tuple[str, ...] = ()

    @abstractmethod
    def base(self, trained: Trained) -> nn.Module:
        """The plain model that a kind of training adapts, on the device; it is not changed."""

    @abstractmethod
    def tasks(self, start: Start, trained: Trained, seed: int) -> Tasks:
        """The tasks, with the heads that a kind of training left."""

    @abstractmethod
    def train(self, start: Start, trained: Trained, task: str, seed: int) -> None:
        """Train one adapter; fill its folder."""

    @abstractmethod
    def adapter_files(self, trained: Trained) -> tuple[str, ...]:
        """The files that `train` writes last, JSON or safetensors."""

    @abstractmethod
    def record(self, start: Start, trained: Trained, task: str, seed: int) -> dict[str, float | None]:
        """The scores of an adapter by itself on "validation" and "test"."""

    def prepared(self) -> list[Job]:
        """The jobs that come before all others."""
        return []

    def begun(self, seeds: int) -> list[Job]:
        """The adapters that tasks set out from."""
        return []

    def controls_of(self, start: Start) -> list[Control]:
        """At B0 = 0 LoRA-FA is layer scope, and is not computed twice."""
        return [c for c in CONTROLS if c.key in self.controls and (start == "warm" or c.key != "lora_fa")]

    def kept_of(self, control: Control) -> list[str]:
        """The methods whose fused vectors of a control are written."""
        return [method for method in self.kept if method in self.options.methods and control.fits(method)]

    def begin_folder(self, start: Start, seed: int) -> Path:
        return self.out / "starts" / start / f"seed{seed}"

    def adapter_folder(self, start: Start, trained: Trained, task: str, seed: int) -> Path:
        return self.out / "adapters" / start / trained / task / f"seed{seed}"

    def fused_folder(self, start: Start, control: Control, seed: int) -> Path:
        return self.out / "fused" / start / control.key / f"seed{seed}"

    def map_folder(self, start: Start, control: Control) -> Path:
        return self.out / "maps" / start / control.key

    def vectors(self, start: Start, trained: Trained, seed: int) -> list[TaskVector]:
        """The trained vectors of all tasks, in their order."""
        folders = [self.adapter_folder(start, trained, task, seed) for task in self.names]
        return [TaskVector.load(folder / TASK_VECTOR_FILE) for folder in folders]

    def fuse(self, start: Start, control: Control, seed: int) -> None:
        """Fuse one control by every method and write the scores."""
        vectors, tasks = self.vectors(start, control.trained, seed), self.tasks(start, control.trained, seed)
        fusion = fuse_control(control, self.base(control.trained), vectors, tasks, self.options, seed)
        with staged(self.fused_folder(start, control, seed)) as staging:
            for method in self.kept_of(control):
                save_vector(fusion.vectors[method], staging / method)
            write_json(staging / SCORES_FILE, fusion.scores)

    def map(self, start: Start, control: Control) -> None:
        """Write the disentanglement map of one control, of the first seed."""
        vectors, tasks = self.vectors(start, control.trained, 0), self.tasks(start, control.trained, 0)
        found = map_control(control, self.base(control.trained), vectors, tasks, self.options)
        with staged(self.map_folder(start, control)) as staging:
            write_json(staging / MAP_FILE, found)

    def phases(self, seeds: int) -> list[list[Job]]:
        """Seed by seed within a phase, so that what is interrupted lacks whole seeds."""
        return [
            self.prepared(),
            self.begun(seeds),
            list(self._trainings(seeds)),
            [*self._fusions(seeds), *(self._maps() if self.options.map_scalings and len(self.names) > 1 else [])],
        ]

    def _trainings(self, seeds: int) -> Iterator[Job]:
        for seed, start, task in itertools.product(range(seeds), self.starts, self.names):
            for trained in dict.fromkeys(control.trained for control in self.controls_of(start)):
                yield Job(
                    f"trained {TRAINED_TITLES[trained]}, {task}, seed {seed}",
                    self.adapter_folder(start, trained, task, seed), self.adapter_files(trained),
                    functools.partial(self.train, start, trained, task, seed), (self.begin_folder(start, seed),),
                )  # fmt: skip

    def _fusions(self, seeds: int) -> Iterator[Job]:
        for seed, start in itertools.product(range(seeds), self.starts):
            for control in reversed(self.controls_of(start)):  # model scope takes longest
                kept = (f"{method}/{TASK_VECTOR_FILE}" for method in self.kept_of(control))
                yield Job(
                    f"fused {control.title}, seed {seed}", self.fused_folder(start, control, seed),
                    (SCORES_FILE, *kept), functools.partial(self.fuse, start, control, seed),
                    self._adapters(start, control, seed),
                )  # fmt: skip

    def _maps(self) -> Iterator[Job]:
        for start in self.starts:
            for control in self.controls_of(start):
                yield Job(
                    f"mapped {control.title}", self.map_folder(start, control), (MAP_FILE,),
                    functools.partial(self.map, start, control), self._adapters(start, control, 0),
                )  # fmt: skip

    def _adapters(self, start: Start, control: Control, seed: int) -> tuple[Path, ...]:
        return tuple(self.adapter_folder(start, control.trained, task, seed) for task in self.names)

    def results(self, seeds: int) -> dict[str, Any]:
        """The numbers of every start and control: fractions of the test split, unless a key says validation."""
        timed = self.out / STEP_TIME_FILE
        return {
            "settings": self.fingerprint(),
            "seeds": seeds,
            "tasks": list(self.names),
            "starts": {
                start: {
                    "title": START_TITLES[start],
                    "note": note,
                    "controls": {c.key: self._control_results(start, c, seeds) for c in self.controls_of(start)},
                }
                for start, note in self.starts.items()
            },
            "step_time": read_json(timed) if timed.exists() else None,
        }

    def _control_results(self, start: Start, control: Control, seeds: int) -> dict[str, Any]:
        records = [[self.record(start, control.trained, task, seed) for task in self.names] for seed in range(seeds)]
        scores = [read_json(self.fused_folder(start, control, seed) / SCORES_FILE) for seed in range(seeds)]
        of_map = self.map_folder(start, control) / MAP_FILE
        return {**control_results(records, scores), "map": read_json(of_map) if of_map.exists() else None}

    def report(self, results: dict[str, Any]) -> Report:
        return report_of(results, self.out)


def save_vector(vector: TaskVector, folder: Path) -> None:
    """A vector, and beside it an adapter for stock PEFT where there is one of its function."""
    if vector.scope != "model":
        export(vector, folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_beside(vector, folder)
