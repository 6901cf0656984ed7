"""The network up to normalised features, and zero-shot heads on them.

A head knows a task's classes by print alone: lightly warped glyphs of each character, in the training faces on plain
paper, as a text tower knows classes by their names. Nothing in it is trained. With the mean token f of an image, the
mean features mᵢ of class i and their mean m over the classes,

    scoreᵢ = 16 cos(f, mᵢ - m)

Pooling and normalisation are in the network and the head is a linear layer, so a network linearized as a whole gives
scores that are linear in the adapter.
"""

from __future__ import annotations

import functools

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize
from transformers import ViTModel

from linlora.quickstart.glyphs.drawing import plain
from linlora.quickstart.glyphs.fonts import TRAINING_FACES, Characters
from linlora.quickstart.glyphs.images import Task
from linlora.quickstart.glyphs.vit import SCALE, WIDTH, backbone, pooled

GLYPHS = 64
"""Glyphs of each class that a head is made from."""


class Network(nn.Module):
    """Encoder, pooling and normalisation: images (n, 1, 16, 16) to features (n, WIDTH) of norm 1.

    With an adapter on the whole, model scope linearizes up to the features, and so up to the scores of any linear head.
    With one on `encoder` alone it linearizes up to the tokens; they are pooled and normalised outside, as ever.
    """

    def __init__(self, encoder: ViTModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        return normalize(pooled(self.encoder(pixel_values=pixel_values)[0]), dim=-1)


def network() -> Network:
    """A new network on the pre-trained backbone, frozen, in evaluation mode."""
    return Network(backbone()).eval()


def head(task: Task) -> nn.Linear:
    """The frozen zero-shot head of a task, without bias: features (n, WIDTH) to scores (n, classes).

    >>> from linlora.quickstart.glyphs import head, network, tasks
    >>> [task] = tasks(["lao"])
    >>> head(task)(network()(task.test.images[:3])).shape
    torch.Size([3, 10])
    """
    means = means_in_print(task.classes)
    linear = nn.Linear(WIDTH, len(means), bias=False)
    linear.load_state_dict({"weight": SCALE * normalize(means - means.mean(0), dim=-1)})
    return linear.requires_grad_(False)


@functools.cache
@torch.no_grad()
def means_in_print(classes: tuple[str, ...]) -> Tensor:
    """The mean features, before normalisation, of each class in print: (classes, WIDTH)."""
    generator = Generator().manual_seed(0)
    labels = torch.arange(len(classes)).repeat_interleave(GLYPHS)
    images = plain(Characters(classes, TRAINING_FACES).draw(labels, generator), generator)
    tokens = backbone()(pixel_values=images)[0]
    return pooled(tokens).unflatten(0, (len(classes), GLYPHS)).mean(1)
