"""What every phase works on: the pre-trained backbone, the tasks with their data, and their frozen heads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn
from transformers import ViTModel

from linlora.quickstart.backbone import fit_head, load_backbone, load_heads, pretrain, save_heads
from linlora.quickstart.data import Digits, Split, SplitName, load_digits
from linlora.quickstart.settings import Family, Settings
from linlora.quickstart.surroundings import surroundings
from linlora.quickstart.tasks import Task, select_tasks
from linlora.quickstart.train import accuracy
from linlora.storage.run_directory import is_whole, read_json, staged, write_json

BACKBONE_FILES = ("config.json", "model.safetensors", "heads.safetensors", "pretraining.json")


@dataclass(frozen=True)
class Experiment:
    """Built once by `prepare`; the phases read it and write under `out`."""

    settings: Settings
    out: Path
    device: str
    tasks: tuple[Task, ...]
    splits: dict[str, dict[SplitName, Split]]
    backbone: ViTModel
    heads: dict[str, nn.Linear]
    pretraining: dict[str, float]

    @property
    def threads(self) -> int:
        return self.settings.threads

    @property
    def reopen(self) -> Callable[[], Experiment]:
        """What a worker process calls to have this experiment too."""
        return partial(open_experiment, self.settings, self.out, self.device)

    def run_directory(self, family: Family, task: str, seed: int) -> Path:
        return self.out / "adapters" / family / task / f"seed{seed}"

    def fused_directory(self, family: Family, seed: int) -> Path:
        return self.out / "fused" / family / f"seed{seed}"

    def accuracies(self, model: nn.Module, split: SplitName) -> list[float]:
        """The accuracy of a model on one split of every task, each read by its own head."""
        return [accuracy(model, self.heads[task.name], self.splits[task.name][split]) for task in self.tasks]


def prepare(
    settings: Settings, out: Path, device: str, on_epoch: Callable[[], None], on_found: Callable[[], None]
) -> Experiment:
    """Open the experiment of a run directory, after making its backbone and heads if they are not there.

    `on_epoch` is called after each epoch of pre-training, `on_found` for each that an earlier call had done.
    """
    if is_whole(out / "backbone", *BACKBONE_FILES):
        for _ in range(settings.pretraining_epochs):
            on_found()
    else:
        _make_backbone(settings, out / "backbone", device, on_epoch, on_found)
    return open_experiment(settings, out, device)


def open_experiment(settings: Settings, out: Path, device: str) -> Experiment:
    """Load what `prepare` made: in the process that made it, and in every worker."""
    directory = out / "backbone"
    tasks = select_tasks(settings.tasks)
    with surroundings(device, settings.threads):
        return Experiment(
            settings, out, device, tasks, _splits(tasks, load_digits(), device), load_backbone(directory).to(device),
            load_heads(directory / "heads.safetensors", device), read_json(directory / "pretraining.json"),
        )  # fmt: skip


def _splits(tasks: tuple[Task, ...], digits: Digits, device: str) -> dict[str, dict[SplitName, Split]]:
    return {task.name: {name: split.to(device) for name, split in task.splits(digits).items()} for task in tasks}


def _make_backbone(
    settings: Settings, directory: Path, device: str, on_epoch: Callable[[], None], on_found: Callable[[], None]
) -> None:
    digits, tasks = load_digits(), select_tasks(settings.tasks)
    splits = _splits(tasks, digits, device)
    upright = {name: split.to(device) for name, split in digits.split(digits.images, digits.digits).items()}
    partial = directory.with_name("backbone.partial")
    partial.mkdir(parents=True, exist_ok=True)
    backbone = pretrain(settings, upright["train"], partial, device, on_epoch, on_found)
    heads = {
        task.name: fit_head(backbone, splits[task.name]["train"].first(settings.head_images), task.labels)
        for task in tasks
    }
    own_head = fit_head(backbone, upright["train"], 10)
    with staged(directory) as staging:
        backbone.save_pretrained(staging)
        save_heads(staging / "heads.safetensors", heads)
        record = {"upright_test_accuracy": accuracy(backbone, own_head, upright["test"])}
        write_json(staging / "pretraining.json", record)
    shutil.rmtree(partial)
