"""The comparison on the quickstart's tasks: where adapters start, how they are trained, and what they are asked.

Two starts. At `zero`, B0 = 0 as PEFT has it, a linearized layer is LoRA with A frozen, so LoRA-FA and layer scope are
one. At `warm` the adapter of a seed has been trained for a few steps on all tasks at once, before every task goes on
from there by itself: B0 != 0, and all controls differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import linlora
from linlora.comparison.controls import Control, Trained
from linlora.comparison.fuse import fuse_control, map_control
from linlora.comparison.settings import Options, Start
from linlora.formats.export import TASK_VECTOR_FILE
from linlora.quickstart import Settings as QuickstartSettings
from linlora.quickstart.backbone import features
from linlora.quickstart.experiment import Experiment
from linlora.quickstart.train import accuracy, adapted, batches, training_steps
from linlora.storage.run_directory import staged, write_json
from linlora.training.adapted import freeze_A
from linlora.vectors.task_vector import TaskVector

START_FILE, RECORD_FILE, SCORES_FILE, MAP_FILE = "start.safetensors", "training.json", "scores.json", "map.json"


@dataclass(frozen=True)
class Settings:
    """What a run directory of `linlora compare` was made with."""

    quickstart: QuickstartSettings = field(default_factory=QuickstartSettings)
    options: Options = field(default_factory=Options)
    starts: tuple[Start, ...] = ("zero", "warm")
    # the warm-up: plain LoRA, every step on as many images of each task, at the learning rate of LoRA
    warmup_steps: int = 20
    warmup_batch: int = 16
    # Chosen as the quickstart's are, by the mean validation accuracy of single-task adapters, seed 0:
    #     learning rate    1e-3    3e-3    5e-3    1e-2    2e-2
    #     LoRA            0.919   0.943   0.945   0.904   0.617
    #     LoRA-FA             –   0.927   0.935   0.948   0.930
    #     layer scope     0.914   0.931   0.940   0.921   0.888
    #     model scope         –   0.918   0.923   0.916   0.916
    warm_learning_rates: tuple[tuple[Trained, float], ...] = (
        ("lora", 5e-3), ("lora-fa", 1e-2), ("layer", 5e-3), ("model", 5e-3),
    )  # fmt: skip

    def learning_rate(self, start: Start, trained: Trained) -> float:
        if start == "warm":
            return dict(self.warm_learning_rates)[trained]
        family: Any = "layer" if trained == "lora-fa" else trained  # one at B0 = 0
        return self.quickstart.learning_rate(family)

    def fingerprint(self, device: str) -> dict[str, Any]:
        """What has to be equal for a run directory to be continued."""
        own = asdict(self)
        del own["quickstart"]
        return {**self.quickstart.fingerprint(device), "compare": own}


class DigitTasks:
    """`linlora.comparison.tasks.Tasks` of the quickstart's tasks, each with its frozen head."""

    trained_modules = ()  # the heads are frozen, and outside of the model

    def __init__(self, experiment: Experiment, options: Options) -> None:
        self.experiment, self.options = experiment, options

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.experiment.tasks)

    def scores(self, model: nn.Module, split: Any) -> list[float]:
        return self.experiment.accuracies(model, split)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        losses = []
        for name in self.names:
            few = self.experiment.splits[name]["validation"].first(self.options.lorahub_examples)
            losses.append(float(cross_entropy(self.logits(model, (name, few.images)), few.labels)))
        return sum(losses) / len(losses)

    def unlabeled(self, size: int) -> Sequence[Sequence[tuple[str, Tensor]]]:
        return [
            [(name, images) for images in self.experiment.splits[name]["validation"].images.split(size)]
            for name in self.names
        ]

    def logits(self, model: nn.Module, batch: tuple[str, Tensor]) -> Tensor:
        task, images = batch
        return self.experiment.heads[task](features(model, images))


def run_directory(experiment: Experiment, start: Start, trained: Trained, task: str, seed: int) -> Path:
    return experiment.out / "adapters" / start / trained / task / f"seed{seed}"


def start_directory(experiment: Experiment, start: Start, seed: int) -> Path:
    return experiment.out / "starts" / start / f"seed{seed}"


def fused_directory(experiment: Experiment, start: Start, control: Control, seed: int) -> Path:
    return experiment.out / "fused" / start / control.key / f"seed{seed}"


def map_directory(experiment: Experiment, start: Start, control: Control) -> Path:
    return experiment.out / "maps" / start / control.key


def begin(settings: Settings, experiment: Experiment, start: Start, seed: int) -> None:
    """Make the adapter from which every task of a start and seed sets out, and write it: a vector that is zero."""
    quickstart = settings.quickstart
    model = adapted(experiment.backbone, quickstart, seed)
    if start == "warm":
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate = settings.learning_rate("zero", "lora")
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=quickstart.weight_decay)
        for images_of_all in _mixture(experiment, settings, seed):
            optimizer.zero_grad()
            for task, batch in images_of_all:
                train = experiment.splits[task]["train"]
                logits = experiment.heads[task](features(model, train.images[batch]))
                (cross_entropy(logits, train.labels[batch]) / len(experiment.tasks)).backward()
            optimizer.step()
    with staged(start_directory(experiment, start, seed)) as staging:
        TaskVector.from_model(model).save(staging / START_FILE)


def _mixture(experiment: Experiment, settings: Settings, seed: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Of every step, a batch of each task."""
    streams = [
        batches(
            len(experiment.splits[task.name]["train"]), settings.warmup_batch, settings.warmup_steps, seed + 100 * i
        )
        for i, task in enumerate(experiment.tasks)
    ]
    for of_step in zip(*streams, strict=True):
        yield [(task.name, batch) for task, batch in zip(experiment.tasks, of_step, strict=True)]


def at_start(settings: Settings, experiment: Experiment, start: Start, trained: Trained, seed: int) -> PeftModel:
    """The model of a kind of training before its first step."""
    model = adapted(experiment.backbone, settings.quickstart, seed)
    load_start(experiment, start, seed).move_point(model)
    if trained in ("layer", "model"):
        linlora.linearize(model, scope=trained)
    elif trained == "lora-fa":
        freeze_A(model)
    return model


def train(settings: Settings, experiment: Experiment, start: Start, trained: Trained, task: str, seed: int) -> None:
    """Train one adapter for one task; write its vector and its scores."""
    head, splits = experiment.heads[task], experiment.splits[task]
    model = at_start(settings, experiment, start, trained, seed)
    rate = settings.learning_rate(start, trained)
    losses = list(training_steps(model, head, splits["train"], settings.quickstart, rate, seed))
    origin = load_start(experiment, start, seed) if trained in ("lora", "lora-fa") else None
    record = {
        "validation": accuracy(model, head, splits["validation"]),
        "test": accuracy(model, head, splits["test"]),
        "last_loss": losses[-1].item(),
    }
    with staged(run_directory(experiment, start, trained, task, seed)) as staging:
        TaskVector.from_model(model, point=origin).save(staging / TASK_VECTOR_FILE)
        write_json(staging / RECORD_FILE, record)


def load_start(experiment: Experiment, start: Start, seed: int) -> TaskVector:
    return TaskVector.load(start_directory(experiment, start, seed) / START_FILE)


def load_vectors(experiment: Experiment, start: Start, trained: Trained, seed: int) -> list[TaskVector]:
    """The vectors of all tasks, in their order."""
    return [
        TaskVector.load(run_directory(experiment, start, trained, task.name, seed) / TASK_VECTOR_FILE)
        for task in experiment.tasks
    ]


def fuse(settings: Settings, experiment: Experiment, start: Start, control: Control, seed: int) -> None:
    """Fuse one control by every method and write the scores."""
    vectors = load_vectors(experiment, start, control.trained, seed)
    tasks = DigitTasks(experiment, settings.options)
    scores = fuse_control(control, experiment.backbone, vectors, tasks, settings.options, seed)
    with staged(fused_directory(experiment, start, control, seed)) as staging:
        write_json(staging / SCORES_FILE, scores)


def measure_map(settings: Settings, experiment: Experiment, start: Start, control: Control) -> None:
    """The disentanglement map of one control, of the first seed."""
    vectors = load_vectors(experiment, start, control.trained, seed=0)
    tasks = DigitTasks(experiment, settings.options)
    found = map_control(control, experiment.backbone, vectors, tasks, settings.options)
    with staged(map_directory(experiment, start, control)) as staging:
        write_json(staging / MAP_FILE, found)
