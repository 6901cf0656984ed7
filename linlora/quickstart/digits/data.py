"""The handwritten digits of scikit-learn (1,797 images of 8 x 8 pixels), in one fixed split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from linlora.experiments.image_suite import Split, SplitName


@dataclass(frozen=True)
class Images:
    """All images and digits, and which of them each split holds."""

    images: Tensor
    digits: Tensor
    indices: dict[SplitName, Tensor]

    def split(self, images: Tensor, labels: Tensor) -> dict[SplitName, Split]:
        """Cut a transformed copy of all images, and labels of them, the way the digits are cut."""
        return {name: Split(images[index], labels[index]) for name, index in self.indices.items()}


def load_digits() -> Images:
    """997 images to train on, 300 to choose on, 500 to report on, with the digits in equal shares.

    Pre-training, heads and every task use this one split, so no test image was ever trained on in any domain.

    >>> {name: len(index) for name, index in load_digits().indices.items()}
    {'train': 997, 'validation': 300, 'test': 500}
    """
    bunch = sklearn.datasets.load_digits()
    rest, test = train_test_split(np.arange(len(bunch.target)), test_size=500, stratify=bunch.target, random_state=0)
    train, validation = train_test_split(rest, test_size=300, stratify=bunch.target[rest], random_state=0)
    return Images(
        images=torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0,
        digits=torch.tensor(bunch.target, dtype=torch.int64),
        indices={
            "train": torch.from_numpy(train),
            "validation": torch.from_numpy(validation),
            "test": torch.from_numpy(test),
        },
    )
