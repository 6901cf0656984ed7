"""What every phase works on: the quickstart's backbone, a frozen head a question, the images of every domain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ViTModel

from linlora.quickstart.backbone import fit_head, load_backbone, load_heads, save_heads
from linlora.quickstart.data import Digits, SplitName, load_digits
from linlora.quickstart.experiment import prepare as prepare_quickstart
from linlora.quickstart.routing.reader import Reader
from linlora.quickstart.routing.settings import RoutingSettings
from linlora.quickstart.routing.tasks import DOMAINS, QUESTIONS, Pair, divide
from linlora.quickstart.surroundings import surroundings
from linlora.storage.run_directory import is_whole

HEADS_FILE = "questions.safetensors"


@dataclass(frozen=True)
class Rows:
    """Images (n, 1, 8, 8) of one or more tasks, with the question of each and its answer."""

    images: Tensor
    question_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Rows:
        index = index.to(self.labels.device)
        return Rows(self.images[index], self.question_ids[index], self.labels[index])


@dataclass(frozen=True)
class RoutingExperiment:
    """Built by `prepare`; the phases read it and write under `out`."""

    settings: RoutingSettings
    out: Path
    device: str
    digits: Digits
    backbone: ViTModel
    heads: dict[str, nn.Linear]
    trained: tuple[Pair, ...]
    held_out: tuple[Pair, ...]

    @property
    def threads(self) -> int:
        return self.settings.quickstart.threads

    @property
    def reopen(self) -> Callable[[], RoutingExperiment]:
        """What a worker process calls to have this experiment too."""
        return partial(open_experiment, self.settings, self.out, self.device)

    def reader(self) -> Reader:
        """A network without adapters, of its own."""
        return Reader(copy.deepcopy(self.backbone), self.heads).to(self.device).eval()

    def rows(self, pair: Pair, split: SplitName) -> Rows:
        """One task's images of a split."""
        index = self.digits.indices[split]
        answers, _ = QUESTIONS[pair.question]
        images = DOMAINS[pair.domain](self.digits.images)[index]
        question = torch.full((len(index),), self.settings.questions.index(pair.question))
        labels = answers(self.digits.digits)[index]
        return Rows(*(tensor.to(self.device) for tensor in (images, question, labels)))

    def inventory_directory(self, inventory: str, seed: int) -> Path:
        return self.out / "inventories" / inventory / f"seed{seed}"

    def adaptation_directory(self, method: str, shots: int, seed: int) -> Path:
        return self.out / "adaptations" / method / f"{shots}-shot" / f"seed{seed}"


def prepare(
    settings: RoutingSettings, out: Path, device: str, on_epoch: Callable[[], None], on_found: Callable[[], None]
) -> RoutingExperiment:
    """Open the experiment of a run directory, after making its backbone and heads if they are not there."""
    backbone = prepare_quickstart(settings.quickstart, out, device, on_epoch, on_found).backbone
    if not is_whole(out, HEADS_FILE):
        digits = load_digits()
        heads = {}
        for question in settings.questions:
            answers, labels = QUESTIONS[question]
            upright = digits.split(digits.images, answers(digits.digits))["train"].to(device)
            heads[question] = fit_head(backbone, upright, labels)
        save_heads(out / HEADS_FILE, heads)
    return open_experiment(settings, out, device)


def open_experiment(settings: RoutingSettings, out: Path, device: str) -> RoutingExperiment:
    """Load what `prepare` made: in the process that made it, and in every worker."""
    trained, held_out = divide(settings.domains, settings.questions)
    with surroundings(device, settings.quickstart.threads):
        heads = load_heads(out / HEADS_FILE, device)
        return RoutingExperiment(
            settings, out, device, load_digits(), load_backbone(out / "backbone").to(device),
            {question: heads[question] for question in settings.questions}, trained, held_out,
        )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows, **routing: Tensor) -> float:
    """The fraction of right answers; `routing` is task_ids of a routed model, or nothing."""
    logits = model(pixel_values=rows.images, question_ids=rows.question_ids, **routing).logits
    return (logits.argmax(-1) == rows.labels).double().mean().item()
