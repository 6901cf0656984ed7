"""Images from bitmaps: light warps, ink, papers and noise, all drawn from a generator on the CPU.

In float64 and in whole gray levels at the end, so that processors which round otherwise draw the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

Paper = Callable[[Tensor, Tensor], Tensor]
"""Where the pattern is, given rows and columns of pixels."""

SIDE = 16
"""Pixels of an image's side."""


def warped(bitmaps: Tensor, generator: Generator) -> Tensor:
    """Bitmaps turned by up to 10 degrees, sheared, scaled and shifted a little: (n, 32, 32) to (n, 1, 16, 16), 0 to 1.

    Sheared by up to 0.15, scaled by up to 15 %, shifted by up to one pixel of the image.
    """
    n = len(bitmaps)
    turn, shear, scale, right, down = (2 * torch.rand(5, n, generator=generator, dtype=torch.float64) - 1).unbind()
    angle, shear, scale = turn * (math.pi / 18), 0.15 * shear, 1 + 0.15 * scale
    first = torch.stack([scale * angle.cos(), scale * (shear - angle.sin()), right * (2 / SIDE)], dim=1)
    second = torch.stack([scale * angle.sin(), scale * angle.cos(), down * (2 / SIDE)], dim=1)
    grid = affine_grid(torch.stack([first, second], dim=1), [n, 1, *bitmaps.shape[1:]], align_corners=False)
    moved = grid_sample(bitmaps[:, None].double() / 255, grid, align_corners=False)
    return avg_pool2d(moved, bitmaps.shape[-1] // SIDE)


def plain(bitmaps: Tensor, generator: Generator) -> Tensor:
    """Images (n, 1, 16, 16) from -1 to 1 of warped glyphs in ink of 0.6 to 1, on plain paper."""
    return _noisy(_inked(warped(bitmaps, generator), 0.6, generator), generator)


def printed(bitmaps: Tensor, paper: Paper, generator: Generator) -> Tensor:
    """Images (n, 1, 16, 16) from -1 to 1 of warped glyphs in ink of 0.8 to 1, on paper whose pattern has 0.6.

    The phase of the pattern is another for each image.
    """
    glyphs = _inked(warped(bitmaps, generator), 0.8, generator)
    phase = 16 * torch.rand(2, len(glyphs), 1, 1, 1, generator=generator, dtype=torch.float64)
    pattern = paper(torch.arange(SIDE).view(-1, 1) + phase[0], torch.arange(SIDE).view(1, -1) + phase[1])
    return _noisy(torch.maximum(glyphs, 0.6 * pattern), generator)


def _inked(glyphs: Tensor, lightest: float, generator: Generator) -> Tensor:
    ink = torch.rand(len(glyphs), 1, 1, 1, generator=generator, dtype=torch.float64)
    return glyphs * (lightest + (1 - lightest) * ink)


def _noisy(images: Tensor, generator: Generator) -> Tensor:
    """Images of 0 to 1 with noise of standard deviation 0.06, in gray levels."""
    return gray(images + 0.06 * torch.randn(images.shape, generator=generator, dtype=torch.float64))


def gray(images: Tensor) -> Tensor:
    """Images of 0 to 1, cut to 256 levels from -1 to 1, in float32."""
    return ((images.clamp(0, 1) * 255).round() / 127.5 - 1).float()


def dots(rows: Tensor, columns: Tensor) -> Tensor:
    """Dots of 2 x 2 pixels, each row of them shifted against the next."""
    return ((rows % 4) < 2) & (((columns + 2 * ((rows // 4) % 2)) % 4) < 2)


def zigzag(rows: Tensor, columns: Tensor) -> Tensor:
    """Lines of 2 pixels that rise and fall."""
    return ((rows + (columns % 8 - 4).abs()) % 5) < 2


def squared(rows: Tensor, columns: Tensor) -> Tensor:
    """A grid of thin lines, 4 pixels apart."""
    return ((rows % 4) < 1) | ((columns % 4) < 1)


def bricks(rows: Tensor, columns: Tensor) -> Tensor:
    """The mortar of a brick wall."""
    return ((rows % 4) < 1) | (((columns + 4 * ((rows // 4) % 2)) % 8) < 1)


def weave(rows: Tensor, columns: Tensor) -> Tensor:
    """Strips of 4 x 4 pixels, across and upright in turns."""
    across = ((rows // 4 + columns // 4) % 2) < 1
    return torch.where(across, rows % 2, columns % 2) < 1


def ripples(rows: Tensor, columns: Tensor) -> Tensor:
    """Rings around points 16 pixels apart."""
    return ((((rows % 16 - 8) ** 2 + (columns % 16 - 8) ** 2).sqrt()) % 4) < 2


PAPERS = {paper.__name__: paper for paper in (dots, zigzag, squared, bricks, weave, ripples)}
