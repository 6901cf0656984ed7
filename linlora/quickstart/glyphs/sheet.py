"""A picture of the tasks: training and test images of every class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from linlora.quickstart.glyphs.drawing import SIDE
from linlora.quickstart.glyphs.images import Split, Task

_EACH = 2  # images of a class in a split


def contact_sheet(tasks: Sequence[Task], path: Path) -> None:
    """Writes a picture with a row of panels for each task: images as trained on, and in the faces of the test.

    A class has a column of each panel.
    """
    figure = Figure(figsize=(9, 0.5 + 1.0 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for panels, task in zip(axes, tasks, strict=True):
        for axis, split in zip(panels, (task.train, task.test), strict=True):
            axis.imshow(_panel(split, len(task.classes)), cmap="gray", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        panels[0].set_ylabel(task.name)
    axes[0][0].set_title("training images")
    axes[0][1].set_title("test images; print in held-out fonts")
    figure.savefig(path, dpi=150)


def _panel(split: Split, classes: int) -> np.ndarray:
    """The first images of each class, below each other: (2 SIDE, classes SIDE), with a pixel of black between."""
    columns = [split.images[split.labels == label][:_EACH, 0] for label in range(classes)]
    framed = torch.full((_EACH, classes, SIDE + 1, SIDE + 1), -1.0)
    framed[..., :SIDE, :SIDE] = torch.stack(columns, dim=1)
    return framed.permute(0, 2, 1, 3).reshape(_EACH * (SIDE + 1), classes * (SIDE + 1)).numpy()
