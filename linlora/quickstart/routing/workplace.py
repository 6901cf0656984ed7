"""The place where jobs work: the digits' backbone, a frozen head a question, the images of every domain."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from linlora.experiments.image_suite import SplitName
from linlora.experiments.jobs import Job
from linlora.quickstart.digits.backbone import fit_head, load_backbone, load_heads, save_heads
from linlora.quickstart.digits.data import Images, load_digits
from linlora.quickstart.routing.reader import Reader
from linlora.quickstart.routing.settings import RoutingSettings
from linlora.quickstart.routing.tasks import DOMAINS, QUESTIONS, Pair, divide

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
class Workplace:
    """A run directory and its settings."""

    settings: RoutingSettings
    out: Path
    device: str = "cpu"

    @property
    def trained(self) -> tuple[Pair, ...]:
        return divide(self.settings.domains, self.settings.questions)[0]

    @property
    def held_out(self) -> tuple[Pair, ...]:
        return divide(self.settings.domains, self.settings.questions)[1]

    def prepared(self) -> list[list[Job]]:
        """The backbone, then a head for each question."""
        data, folder = self.settings.data, self.out / "backbone"
        backbone = Job("pre-trained", folder, data.files, functools.partial(data.prepare, folder, self.device))
        return [[backbone], [Job("fitted heads", self.out, (HEADS_FILE,), self.fit_heads, (folder,))]]

    def fit_heads(self) -> None:
        backbone, digits = load_backbone(self.out / "backbone").to(self.device), load_digits()
        heads = {}
        for question in self.settings.questions:
            answers, labels = QUESTIONS[question]
            upright = digits.split(digits.images, answers(digits.digits))["train"].to(self.device)
            heads[question] = fit_head(backbone, upright, labels)
        save_heads(self.out / HEADS_FILE, heads)

    def reader(self) -> Reader:
        """A network without adapters, of its own."""
        backbone, heads = _read(self.settings, self.out, self.device)
        asked = {question: heads[question] for question in self.settings.questions}
        return Reader(copy.deepcopy(backbone), asked).to(self.device).eval()

    def rows(self, pair: Pair, split: SplitName) -> Rows:
        """One task's images of a split."""
        digits = _digits()
        index = digits.indices[split]
        answers, _ = QUESTIONS[pair.question]
        images = DOMAINS[pair.domain](digits.images)[index]
        question = torch.full((len(index),), self.settings.questions.index(pair.question))
        labels = answers(digits.digits)[index]
        return Rows(*(tensor.to(self.device) for tensor in (images, question, labels)))

    def inventory_folder(self, inventory: str, seed: int) -> Path:
        return self.out / "inventories" / inventory / f"seed{seed}"

    def adaptation_folder(self, method: str, shots: int, seed: int) -> Path:
        return self.out / "adaptations" / method / f"{shots}-shot" / f"seed{seed}"


@functools.lru_cache(maxsize=1)
def _digits() -> Images:
    return load_digits()


@functools.lru_cache(maxsize=1)
def _read(settings: RoutingSettings, out: Path, device: str) -> tuple[nn.Module, Mapping[str, nn.Linear]]:
    """Once in a process; a run of other settings, started over in the folder, has a backbone of its own."""
    return load_backbone(out / "backbone").to(device), load_heads(out / HEADS_FILE, device)


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows, **routing: Tensor) -> float:
    """The fraction of right answers; `routing` is task_ids of a routed model, or nothing."""
    logits = model(pixel_values=rows.images, question_ids=rows.question_ids, **routing).logits
    return (logits.argmax(-1) == rows.labels).double().mean().item()
