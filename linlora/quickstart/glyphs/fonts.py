"""Glyphs of matplotlib's fonts as bitmaps, and the faces that only test images may show.

Each glyph is drawn once at 128 pixels, cut to its ink, scaled so that its longer side is three quarters of a square
canvas, and centred. Regular and bold slanted DejaVu are test faces: neither pre-training, nor heads, nor the training
and validation images of any task are drawn with them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Generator, Tensor

CANVAS = 32
"""Pixels of a bitmap's side: twice an image's, so that warping it loses little."""

TEST_FACES = (
    "DejaVuSans", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-BoldItalic",
)  # fmt: skip
TRAINING_FACES = (
    "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip

_SIZE = 128
_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def faces_with(character: str, faces: Iterable[str]) -> list[str]:
    """The faces that have a glyph for a character.

    Computer Modern files follow TeX's encodings outside of letters and digits, and are used for these alone.
    """
    return [face for face in faces if ord(character) in _coverage(face)]


def bitmaps(character: str, faces: Sequence[str]) -> Tensor:
    """A character in each of the faces: (faces, CANVAS, CANVAS) in uint8, ink is 255.

    >>> drawn = bitmaps("ა", ["DejaVuSans", "DejaVuSerif"])
    >>> drawn.shape, drawn.dtype, drawn.max().item()
    (torch.Size([2, 32, 32]), torch.uint8, 255)
    """
    return torch.stack([_bitmap(character, face) for face in faces])


class Characters:
    """Some characters in all those of the faces that have them, to draw from."""

    def __init__(self, characters: Sequence[str], faces: Sequence[str]) -> None:
        drawn = [bitmaps(character, faces_with(character, faces)) for character in characters]
        self._bitmaps = torch.cat(drawn)
        self._counts = torch.tensor([len(of_character) for of_character in drawn])
        self._first = self._counts.cumsum(0) - self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def draw(self, classes: Tensor, generator: Generator) -> Tensor:
        """A bitmap for each of the classes (n,), numbers of characters, in a face drawn for it: (n, CANVAS, CANVAS)."""
        face = (torch.rand(len(classes), generator=generator, dtype=torch.float64) * self._counts[classes]).long()
        return self._bitmaps[self._first[classes] + face]


@functools.cache
def _bitmap(character: str, face: str) -> Tensor:
    if not faces_with(character, [face]):
        raise ValueError(f"{face} has no glyph for {character!r} (U+{ord(character):04X})")
    mask = _font(face).getmask(character, mode="L")
    ink = np.asarray(mask, dtype=np.uint8).reshape(mask.size[1], mask.size[0])
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if not len(rows):
        raise ValueError(f"{face} draws {character!r} (U+{ord(character):04X}) without ink")
    cut = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = 0.75 * CANVAS / max(cut.size)
    width, height = (max(1, round(scale * side)) for side in cut.size)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(cut.resize((width, height), Image.Resampling.BOX), ((CANVAS - width) // 2, (CANVAS - height) // 2))
    return torch.from_numpy(np.array(canvas))


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_FOLDER / f"{face}.ttf", _SIZE, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _coverage(face: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    covered = frozenset(FT2Font(str(_FOLDER / f"{face}.ttf")).get_charmap())
    if face.startswith("cm"):
        covered &= (
            {ord(character) for character in "0123456789"}
            | {*range(ord("A"), ord("Z") + 1)}
            | {*range(ord("a"), ord("z") + 1)}
        )
    return covered
