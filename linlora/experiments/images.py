"""Comparisons on images that are whole in memory: a small network, frozen heads, a training loop in plain PyTorch.

Two starts. At `zero`, B0 = 0 as PEFT has it, a linearized layer is LoRA with A frozen, so LoRA-FA and layer scope are
one. At `warm` the adapter of a seed has been trained for a few steps on all tasks at once, before every task goes on
from there by itself: B0 != 0, and all controls differ.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import linlora
from linlora.experiments.comparison import Comparison, save_vector
from linlora.experiments.controls import START_NOTES, Start, Trained
from linlora.experiments.descent import batches, descend
from linlora.experiments.environment import surroundings
from linlora.experiments.image_suite import ImageData, ImageSuite, Split, accuracy, features
from linlora.experiments.jobs import Job
from linlora.experiments.options import Options
from linlora.formats.adapter_config import CONFIG_FILE
from linlora.formats.vector_folder import TASK_VECTOR_FILE
from linlora.storage.run_directory import read_json, staged, write_json
from linlora.training.adapted import freeze_A
from linlora.vectors.task_vector import TaskVector

RECORD_FILE, START_FILE = "training.json", "start.safetensors"


@dataclass(frozen=True)
class Settings:
    """The settings of a run directory. Two runs of equal settings share their files; others are refused.

    Attributes:
        learning_rates: by start and kind of training.
        warmup_steps: of the start "warm": plain LoRA, every step on `warmup_batch` images of each task, at the learning
            rate of LoRA.
        timed_steps: interleaved steps beside `torch.func`, of which the first `untimed_steps` are not counted; 0 times
            nothing.
        threads: of the CPU in every process. The tensors are so small that a second one gains nothing (32 ms a step of
            pre-training with two, 31 ms with one), and where cores are shared two that wait for each other cost a lot
            (3 s a fine-tuning became 20 to 90 s; with one thread 4 s).
    """

    data: ImageData
    learning_rates: tuple[tuple[Start, Trained, float], ...]
    options: Options = field(default_factory=Options)
    starts: tuple[Start, ...] = ("zero",)
    controls: tuple[str, ...] = Comparison.controls
    kept: tuple[str, ...] = ()
    rank: int = 8
    alpha: int = 16
    steps: int = 100
    batch: int = 64
    weight_decay: float = 0.01
    warmup_steps: int = 20
    warmup_batch: int = 16
    timed_steps: int = 0
    untimed_steps: int = 5
    threads: int = 1

    def learning_rate(self, start: Start, trained: Trained) -> float:
        return {(s, t): rate for s, t, rate in self.learning_rates}[start, trained]


class ImageExperiment(Comparison):
    """The comparison of some settings in a run directory."""

    def __init__(self, settings: Settings, out: Path, device: str = "cpu") -> None:
        self.settings, self.out, self.device = settings, out, device
        self.names, self.controls, self.kept = settings.data.names, settings.controls, settings.kept
        self.options = settings.options
        self.starts = {start: START_NOTES[start] for start in settings.starts}

    def fingerprint(self) -> dict[str, Any]:
        return asdict(self.settings)

    @property
    def suite(self) -> ImageSuite:
        """Read once in a process."""
        return _suite(self.settings.data, self.out / "backbone", self.device)

    def base(self, trained: Trained) -> nn.Module:
        return self.suite.network

    def tasks(self, start: Start, trained: Trained, seed: int) -> ImageSuite:
        return self.suite

    def around(self) -> AbstractContextManager[None]:
        return surroundings(self.device, self.settings.threads)

    def prepared(self) -> list[Job]:
        data, folder = self.settings.data, self.out / "backbone"
        return [Job("pre-trained", folder, data.files, functools.partial(data.prepare, folder, self.device))] * bool(
            data.files
        )

    def begun(self, seeds: int) -> list[Job]:
        return [
            Job(
                f"started seed {seed}", self.begin_folder(start, seed), (START_FILE,),
                functools.partial(self.begin, start, seed), (self.out / "backbone",),
            )
            for seed in range(seeds) for start in self.starts
        ]  # fmt: skip

    def begin(self, start: Start, seed: int) -> None:
        """Make the adapter from which every task of a start and seed sets out, and write it: a vector that is zero."""
        settings, suite = self.settings, self.suite
        model = adapted(suite.network, settings, seed)
        if start == "warm":
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            rate = settings.learning_rate("zero", "lora")
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=settings.weight_decay)
            for batch_of_all in _mixture(suite, settings, seed):
                optimizer.zero_grad()
                for task, batch in batch_of_all:
                    train = suite.splits[task]["train"]
                    logits = suite.heads[task](features(model, train.images[batch]))
                    (cross_entropy(logits, train.labels[batch]) / len(suite.splits)).backward()
                optimizer.step()
        with staged(self.begin_folder(start, seed)) as staging:
            TaskVector.from_model(model).save(staging / START_FILE)

    def at_start(self, start: Start, trained: Trained, seed: int) -> PeftModel:
        """The model of a kind of training before its first step."""
        model = adapted(self.suite.network, self.settings, seed)
        self._load_start(start, seed).move_point(model)
        return of_kind(model, trained)

    def train(self, start: Start, trained: Trained, task: str, seed: int) -> None:
        head, splits = self.suite.heads[task], self.suite.splits[task]
        begin = time.perf_counter()
        model = self.at_start(start, trained, seed)
        rate = self.settings.learning_rate(start, trained)
        losses = list(training_steps(model, head, splits["train"], self.settings, rate, seed))
        record = {
            "validation": accuracy(model, head, splits["validation"]),
            "test": accuracy(model, head, splits["test"]),
            "first_loss": losses[0].item(),
            "last_loss": losses[-1].item(),
            "seconds": time.perf_counter() - begin,
        }
        origin = self._load_start(start, seed) if trained in ("lora", "lora-fa") else None
        with staged(self.adapter_folder(start, trained, task, seed)) as staging:
            save_vector(TaskVector.from_model(model, point=origin), staging)
            write_json(staging / RECORD_FILE, record)

    def adapter_files(self, trained: Trained) -> tuple[str, ...]:
        files = (TASK_VECTOR_FILE, RECORD_FILE)
        return files if trained == "model" else (*files, CONFIG_FILE, "adapter_model.safetensors")

    def record(self, start: Start, trained: Trained, task: str, seed: int) -> dict[str, float | None]:
        return read_json(self.adapter_folder(start, trained, task, seed) / RECORD_FILE)

    def _load_start(self, start: Start, seed: int) -> TaskVector:
        return TaskVector.load(self.begin_folder(start, seed) / START_FILE)


@functools.lru_cache(maxsize=2)
def _suite(data: ImageData, folder: Path, device: str) -> ImageSuite:
    return data.open(folder).to(device)


def adapted(network: nn.Module, settings: Settings, seed: int) -> PeftModel:
    """A copy of the network with a new LoRA adapter on every linear layer.

    Equal seeds give equal adapters: all tasks and all kinds of training of one seed start at one point, which is what
    lets their task vectors be added. The adapter is drawn on the CPU, so it is the same on every device.
    """
    device = next(network.parameters()).device
    torch.manual_seed(seed)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear")
    return get_peft_model(copy.deepcopy(network).cpu(), config).to(device).eval()


def of_kind(model: PeftModel, trained: Trained) -> PeftModel:
    """The model as it is for plain LoRA, with A frozen, or linearized in place at a scope."""
    if trained == "lora-fa":
        freeze_A(model)
    elif trained != "lora":
        linlora.linearize(model, scope=trained)
    return model


def training_steps(
    model: nn.Module, head: nn.Linear, train: Split, settings: Settings, learning_rate: float, seed: int
) -> Iterator[Tensor]:
    """Train the adapter; yields the loss of each step, after the step.

    The batches depend on the seed alone, so models given the same seed see the same images in the same order.
    """

    def loss(batch: Tensor) -> Tensor:
        batch = batch.to(train.labels.device)
        return cross_entropy(head(features(model, train.images[batch])), train.labels[batch])

    return descend(
        [parameter for parameter in model.parameters() if parameter.requires_grad], settings.steps,
        batches(len(train), settings.batch, settings.steps, seed), loss, lr=learning_rate,
        weight_decay=settings.weight_decay,
    )  # fmt: skip


def _mixture(suite: ImageSuite, settings: Settings, seed: int) -> Iterator[list[tuple[str, Tensor]]]:
    """For every step, a batch of each task."""
    streams = [
        batches(len(task["train"]), settings.warmup_batch, settings.warmup_steps, seed + 100 * i)
        for i, task in enumerate(suite.splits.values())
    ]
    for of_step in zip(*streams, strict=True):
        yield list(zip(suite.splits, of_step, strict=True))
