"""Experiments on images that are whole in memory: a small network, frozen heads, and a training loop in plain PyTorch.

Two starts. At `zero`, B0 = 0 as PEFT has it, a linearized layer is LoRA with A frozen, so LoRA-FA and layer scope are
one. At `warm` the adapter of a seed has been trained for a few steps on all tasks at once, before every task goes on
from there by itself: B0 != 0, and all controls differ.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import linlora
from linlora.experiments.controls import CONTROLS, Trained
from linlora.experiments.environment import surroundings
from linlora.experiments.experiment import Experiment, save_vector
from linlora.experiments.jobs import Job
from linlora.experiments.options import START_NOTES, Options, Start
from linlora.formats.adapter_config import CONFIG_FILE
from linlora.formats.vector_folder import TASK_VECTOR_FILE
from linlora.storage.run_directory import read_json, staged, write_json
from linlora.training.adapted import freeze_A
from linlora.vectors.task_vector import TaskVector

SplitName = Literal["train", "validation", "test"]
RECORD_FILE, START_FILE = "training.json", "start.safetensors"


@dataclass(frozen=True)
class Split:
    """Images (n, 1, H, W) and their labels (n,), whole, on one device: no loader is needed."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Split:
        return Split(self.images[:count], self.labels[:count])

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageSuite:
    """A pre-trained network and tasks on it, as `linlora.experiments.tasks.Tasks` asks; the heads are no part of it.

    Attributes:
        network: takes `pixel_values`; its first output are the features (n, width), or tokens (n, tokens, width) of
            which the first is read. All of it is linearized at model scope.
        heads: a frozen linear head for each task, on the features.
    """

    network: nn.Module
    splits: Mapping[str, Mapping[SplitName, Split]]
    heads: Mapping[str, nn.Linear]

    trained_modules: ClassVar[tuple[str, ...]] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.splits)

    def scores(self, model: nn.Module, split: Any) -> list[float]:
        """The accuracy of a model on one split of every task, each read by its own head."""
        return [accuracy(model, self.heads[name], of_task[split]) for name, of_task in self.splits.items()]

    def unlabeled(self, size: int) -> list[list[dict[str, Any]]]:
        return [
            [{"task": name, "inputs": {"pixel_values": images}} for images in task["validation"].images.split(size)]
            for name, task in self.splits.items()
        ]

    def labeled(self, size: int, limit: int) -> list[list[dict[str, Any]]]:
        batches = self.unlabeled(size)
        for of_task, task in zip(batches, self.splits.values(), strict=True):
            for batch, labels in zip(of_task, task["validation"].labels.split(size), strict=True):
                batch["labels"] = labels
        return [of_task[: -(-limit // size)] for of_task in batches]

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self.heads[batch["task"]](features(model, **batch["inputs"]))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return cross_entropy(self.logits(model, batch), batch["labels"])

    def to(self, device: str) -> ImageSuite:
        splits = {name: {key: split.to(device) for key, split in task.items()} for name, task in self.splits.items()}
        return ImageSuite(self.network.to(device), splits, {name: head.to(device) for name, head in self.heads.items()})


class ImageData(Hashable, Protocol):
    """Where a suite comes from: a frozen dataclass, part of the settings."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def files(self) -> tuple[str, ...]:
        """The files that `prepare` writes; none where the package brings them."""
        ...

    def prepare(self, folder: Path, device: str) -> None: ...

    def open(self, folder: Path) -> ImageSuite:
        """On the CPU."""
        ...


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
    controls: tuple[str, ...] = tuple(control.key for control in CONTROLS if control.key != "features")
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


@dataclass(frozen=True)
class ImageExperiment(Experiment):
    """The experiment of some settings in a run directory."""

    settings: Settings
    out: Path
    device: str = "cpu"

    @property
    def options(self) -> Options:  # type: ignore[override]
        return self.settings.options

    @property
    def kept(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.settings.kept

    @property
    def names(self) -> tuple[str, ...]:
        return self.settings.data.names

    @property
    def controls(self) -> tuple[str, ...]:
        return self.settings.controls

    @property
    def starts(self) -> dict[Start, str]:
        return {start: START_NOTES[start] for start in self.settings.starts}

    def fingerprint(self) -> dict[str, Any]:
        return {"linlora": linlora.__version__, "device": self.device, **asdict(self.settings)}

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


def features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """The features that heads read, (n, width): the first output, or its first token."""
    output = model(pixel_values=pixel_values)
    first = output if isinstance(output, Tensor) else output[0]  # a tensor of baselines.FunctorchModel
    return first[:, 0] if first.ndim == 3 else first


@torch.no_grad()
def accuracy(model: nn.Module, head: nn.Linear, split: Split) -> float:
    predicted = head(features(model, split.images)).argmax(dim=-1)
    return (predicted == split.labels).double().mean().item()


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
    """Train the adapter; yields the loss of each step, after the step. AdamW, the learning rate falling to zero.

    The batches depend on the seed alone, so models given the same seed see the same images in the same order.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    for batch in batches(len(train), settings.batch, settings.steps, seed):
        batch = batch.to(train.labels.device)
        loss = cross_entropy(head(features(model, train.images[batch])), train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()


def batches(images: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of `steps` full batches, reshuffled each time the images are used up."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, images)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(queue) < batch:
            queue = torch.randperm(images, generator=generator)
        yield queue[:batch]
        queue = queue[batch:]


def _mixture(suite: ImageSuite, settings: Settings, seed: int) -> Iterator[list[tuple[str, Tensor]]]:
    """For every step, a batch of each task."""
    streams = [
        batches(len(task["train"]), settings.warmup_batch, settings.warmup_steps, seed + 100 * i)
        for i, task in enumerate(suite.splits.values())
    ]
    for of_step in zip(*streams, strict=True):
        yield list(zip(suite.splits, of_step, strict=True))
