"""The rule by which classes are chosen, for the tasks and for pre-training.

A character looks like the mean of its bitmaps over the training faces. Two look alike when those means, centred,
correlate by more than `ALIKE`. No two classes of a task look alike, nor do two of pre-training, nor a class of
pre-training and one of a task.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from linlora.quickstart.glyphs.fonts import TRAINING_FACES, bitmaps, faces_with

ALIKE = 0.85

PRETRAINING_BLOCKS = {
    "Basic Latin": (0x21, 0x7E),
    "Latin-1 Supplement": (0xA1, 0xFF),
    "Latin Extended-B": (0x180, 0x24F),
    "IPA Extensions": (0x250, 0x2AF),
    "Greek": (0x370, 0x3FF),
    "Cyrillic": (0x400, 0x45F),
    "Armenian": (0x531, 0x587),
    "Arrows": (0x2190, 0x21FF),
    "Mathematical Operators": (0x2200, 0x22FF),
    "Miscellaneous Technical": (0x2300, 0x23FF),
    "Box Drawing": (0x2500, 0x257F),
    "Geometric Shapes": (0x25A0, 0x25FF),
}
"""Unicode blocks of the pre-training classes, first and last code point; digits are left out."""


def appearance(character: str) -> Tensor:
    """The centred mean of a character over the training faces that have it, of norm 1: (256,)."""
    drawn = bitmaps(character, faces_with(character, TRAINING_FACES)).float()
    mean = avg_pool2d(drawn[:, None], 2).mean(0).flatten()
    centred = mean - mean.mean()
    return centred / centred.norm()


def distinct(characters: Iterable[str], unlike: Sequence[str] = (), count: int | None = None) -> list[str]:
    """The first `count` characters, in their order, that look like none kept before and like none of `unlike`.

    >>> distinct("ABBAXY", unlike="X")
    ['A', 'B', 'Y']
    """
    kept: list[str] = []
    looks = [appearance(character) for character in unlike]
    for character in characters:
        if len(kept) == count:
            break
        look = appearance(character)
        if not looks or torch.stack(looks).mv(look).max() <= ALIKE:
            kept.append(character)
            looks.append(look)
    return kept


def pretraining_classes(unlike: Sequence[str]) -> list[str]:
    """The characters of pre-training: at least three training faces have them, and none looks like one of `unlike`."""
    pool = (chr(point) for first, last in PRETRAINING_BLOCKS.values() for point in range(first, last + 1))
    return distinct((character for character in pool if _is_pretrained(character)), unlike)


def _is_pretrained(character: str) -> bool:
    mark = unicodedata.category(character) in ("Mn", "Cn", "Zs", "Cf", "Lm", "Sk")
    return not mark and not character.isdigit() and len(faces_with(character, TRAINING_FACES)) >= 3
