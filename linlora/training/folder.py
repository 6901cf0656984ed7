"""The folder of a run: its settings, its checkpoints, its results.

settings.yaml                 what the run was started with
rows.json                     how many rows each split had, with a digest
point.safetensors             the linearization point, written before the first step
checkpoint-N/                 of transformers' Trainer
adapter_model.safetensors, adapter_config.json     for stock PEFT; none at model scope, which no adapter has
task_vector.safetensors       for linlora: TaskVector.load
head.safetensors              a head that was trained; model_config/config.json names its classes
prototypes.safetensors        a head of prototypes
README.md                     the model card
learning_rates/RATE/          runs of lr_grid, until the best is chosen
metrics.json                  the last file: a folder that holds it is done
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor

from linlora.formats import model_config
from linlora.formats.vector_folder import TASK_VECTOR_FILE
from linlora.storage.files import read_json
from linlora.storage.run_directory import LOCK_FILE, TRAINING_FILE, accept_directory
from linlora.storage.run_directory import only_run_in as locked
from linlora.storage.tensor_files import load_tensors
from linlora.training import plain_yaml
from linlora.training.adapted import adapt
from linlora.training.head import HEAD_FILE, set_head
from linlora.training.settings import Settings
from linlora.training.task import Task
from linlora.vectors.task_vector import TaskVector, apply

POINT_FILE = "point.safetensors"
METRICS_FILE = "metrics.json"
GRID_FOLDER = "learning_rates"
_STATE_FILE = "trainer_state.json"  # the Trainer writes it last


@dataclass(frozen=True)
class Run:
    """A finished run. `Run.open(folder)` reads one; `train` returns one.

    Attributes:
        folder: where it is.
        settings: what it was started with.
        metrics: what metrics.json holds: the scores by split, how long it took, and where.
    """

    folder: Path
    settings: Settings
    metrics: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Raises FileNotFoundError for a folder that is not of a finished run, and says what it is."""
        folder = Path(folder)
        if not (folder / TRAINING_FILE).is_file():
            raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {TRAINING_FILE}")
        if not (folder / METRICS_FILE).is_file():
            raise FileNotFoundError(f"the run in {folder} is not finished; start it again to continue")
        return cls(folder, settings_in(folder), read_json(folder / METRICS_FILE))

    @property
    def vector(self) -> TaskVector:
        return TaskVector.load(self.folder / TASK_VECTOR_FILE)

    @property
    def head(self) -> dict[str, Tensor] | None:
        """The trained head, for `linlora.training.set_head`; None where none was trained."""
        path = self.folder / HEAD_FILE
        return load_tensors(path)[0] if path.exists() else None

    def model(self, task: Task) -> PeftModel:
        """The model of the run, made anew, with its adapter and head, on the device it is evaluated on."""
        model = adapt(task, point=self.vector).model
        apply(model, self.vector)
        if (head := self.head) is not None:
            set_head(model, head)
        return model.to(self.settings.device)

    def copy_to(self, folder: Path) -> None:
        """Copy what the run made, its checkpoints aside."""
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in (TRAINING_FILE, METRICS_FILE, LOCK_FILE):
                shutil.copyfile(path, folder / path.name)
            elif path.name == model_config.FOLDER:
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)


def settings_in(folder: Path) -> Settings:
    """The settings of a run; one that was made before there was a choice ended at the features of zero-shot."""
    content = plain_yaml.read(folder / TRAINING_FILE)
    if content.get("kind") == "zero-shot":
        content.setdefault("linear_to", "features")
    return Settings.from_dict(content, str(folder / TRAINING_FILE))


def check_folder(settings: Settings, fresh: bool = False) -> None:
    """Accept a new folder, or that of a run of the same settings to continue; with `fresh` delete the run in it.

    Raises ValueError for a run of other settings, with the fields that differ; FileExistsError for a folder that holds
    anything else, which is never written to, nor emptied.
    """
    folder = Path(settings.out)
    ours = (folder / TRAINING_FILE).exists()
    different = _differences(settings_in(folder), settings) if ours else []  # raises for another program's file
    accept_directory(folder, "run of linlora train", ours, different, fresh)


def _differences(before: Settings, now: Settings) -> list[str]:
    """The settings that differ, the test split aside, which has no say in what was trained."""
    return [d for d in before.differences(now) if not d.startswith("data.test:")]


def is_finished(settings: Settings) -> bool:
    """Whether the run of some settings is done."""
    return (Path(settings.out) / METRICS_FILE).exists()


@contextmanager
def only_run_in(folder: Path, state: PartialState) -> Iterator[None]:
    """Make the folder and keep a second run out of it. The lock is the first process's and ends with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) if state.is_main_process else nullcontext():
        yield


def kept_point(settings: Settings) -> TaskVector | None:
    """The point an interrupted run started from."""
    path = Path(settings.out) / POINT_FILE
    return TaskVector.load(path) if path.exists() else None


def last_checkpoint(folder: Path, state: PartialState) -> str | None:
    """The last checkpoint that is whole, the same for every process; one that was cut short is deleted."""
    found: list[tuple[int, str]] = []
    if state.is_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            try:
                found.append((read_json(checkpoint / _STATE_FILE)["global_step"], str(checkpoint)))
            except (OSError, ValueError, KeyError):
                shutil.rmtree(checkpoint)
    last = [max(found)[1] if found else None]
    return broadcast_object_list(last)[0]


def processes_of(checkpoint: str) -> int:
    """How many processes wrote a checkpoint: each one its random state."""
    return len(list(Path(checkpoint).glob("rng_state*.pth")))
