"""The tasks: handwritten digits, and five printed scripts, each on a paper of its own.

No class was seen in pre-training. Training and validation images show the training faces, test images the test faces;
of the handwriting, scikit-learn's images are split.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from torch import Generator
from torch.nn.functional import interpolate

from linlora.experiments.image_suite import Split, SplitName
from linlora.quickstart.glyphs.drawing import PAPERS, gray, printed
from linlora.quickstart.glyphs.fonts import TEST_FACES, TRAINING_FACES, Characters
from linlora.quickstart.glyphs.scripts import SCRIPTS, Script, selected

IMAGES: dict[SplitName, int] = {"train": 1000, "validation": 200, "test": 300}
"""Images of each split of each task."""


@dataclass(frozen=True)
class Task:
    """A name, the character of each class, and the images of each split."""

    name: str
    classes: tuple[str, ...]
    splits: dict[SplitName, Split]

    @property
    def train(self) -> Split:
        return self.splits["train"]

    @property
    def validation(self) -> Split:
        return self.splits["validation"]

    @property
    def test(self) -> Split:
        return self.splits["test"]

    def to(self, device: torch.device | str) -> Task:
        return Task(self.name, self.classes, {name: split.to(device) for name, split in self.splits.items()})


def tasks(names: Sequence[str] | None = None) -> list[Task]:
    """The tasks of the given names, all for None. Drawn once a process, in some seconds.

    They are the same bits wherever matplotlib's fonts, Pillow and its FreeType are the same versions; other versions
    may shade the edges of a glyph otherwise.

    Raises:
        ValueError: no task has one of the names.

    >>> [task.name for task in tasks()]
    ['digits', 'arabic', 'syllabics', 'georgian', 'hebrew', 'lao']
    >>> tasks(["hebrew"])[0].train.images.shape
    torch.Size([1000, 1, 16, 16])
    """
    return [_task(script) for script in selected(names)]


@functools.cache
def _task(script: Script) -> Task:
    splits = _handwritten() if script.paper is None else {name: _printed(script, name) for name in IMAGES}
    return Task(script.name, tuple(script.letters), splits)


def _printed(script: Script, name: SplitName) -> Split:
    """Every class equally often, each image in a face drawn for it."""
    assert script.paper is not None
    generator = Generator().manual_seed(list(IMAGES).index(name) + 10 * SCRIPTS.index(script))
    labels = torch.arange(IMAGES[name]) % len(script.letters)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    characters = Characters(script.letters, TEST_FACES if name == "test" else TRAINING_FACES)
    return Split(printed(characters.draw(labels, generator), PAPERS[script.paper], generator), labels)


def _handwritten() -> dict[SplitName, Split]:
    """1,500 of scikit-learn's 1,797 images of 8 x 8 pixels, enlarged, with the digits in equal shares."""
    bunch = sklearn.datasets.load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float64)[:, None] / 16
    images = gray(interpolate(images, scale_factor=2, mode="bilinear", align_corners=False))
    labels = torch.tensor(bunch.target)
    splits: dict[SplitName, Split] = {}
    rest = np.arange(len(labels))
    for name, size in IMAGES.items():
        chosen, rest = train_test_split(rest, train_size=size, stratify=bunch.target[rest], random_state=0)
        splits[name] = Split(images[chosen], labels[chosen])
    return splits
