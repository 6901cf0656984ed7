"""Zero-shot heads, and the whole classifier as one module.

A head knows a task's classes by print alone: lightly warped glyphs of each character, in the training faces on plain
paper, as a text tower knows classes by their names. Nothing in it is trained. With the mean features mᵢ of class i,
their mean m over the classes and the mean token f of an image,

    scoreᵢ = 16 cos(f - m, mᵢ - m)
"""

from __future__ import annotations

import functools

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear, normalize
from transformers import ViTModel

from linlora.quickstart.glyphs.drawing import plain
from linlora.quickstart.glyphs.fonts import TRAINING_FACES, Characters
from linlora.quickstart.glyphs.images import Task
from linlora.quickstart.glyphs.vit import SCALE, backbone, pooled

GLYPHS = 64
"""Glyphs of each class that a head is made from."""


class Head(nn.Module):
    """Pooling, normalisation and scores: the tokens (n, tokens, width) of an encoder to (n, classes)."""

    def __init__(self, means: Tensor) -> None:
        """`means` (classes, width): the mean features of each class."""
        super().__init__()
        centre = means.mean(0)
        self.register_buffer("centre", centre)
        self.register_buffer("prototypes", SCALE * normalize(means - centre, dim=-1))

    centre: Tensor
    prototypes: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        return linear(normalize(pooled(tokens) - self.centre, dim=-1), self.prototypes)


class Classifier(nn.Module):
    """Encoder and head in one: images (n, 1, 16, 16) to scores (n, classes).

    With an adapter on the classifier, model scope linearizes up to the scores. With one on `classifier.encoder` it
    linearizes up to the tokens, and the head stays outside, as it is.
    """

    def __init__(self, encoder: ViTModel, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.encoder(pixel_values=pixel_values).last_hidden_state)


def classifier(task: Task) -> Classifier:
    """A new classifier for a task: the frozen backbone, and the task's zero-shot head.

    >>> from linlora.quickstart.glyphs import tasks
    >>> task = tasks(["lao"])[0]
    >>> classifier(task)(task.test.images[:3]).shape
    torch.Size([3, 10])
    """
    return Classifier(backbone(), Head(_means(task.classes))).eval()


@functools.cache
@torch.no_grad()
def _means(classes: tuple[str, ...]) -> Tensor:
    generator = Generator().manual_seed(0)
    labels = torch.arange(len(classes)).repeat_interleave(GLYPHS)
    images = plain(Characters(classes, TRAINING_FACES).draw(labels, generator), generator)
    tokens = backbone()(pixel_values=images).last_hidden_state
    return pooled(tokens).unflatten(0, (len(classes), GLYPHS)).mean(1)
