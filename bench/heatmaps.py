"""Heat maps of the performance programme: time over F.linear, shape by rank, a picture for every provider."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm

from .providers import FLOOR, PROVIDERS
from .results import CaseResult, Run

_WORST = 1.5  # over this, every colour is the same red


def draw(run: Run, folder: Path, stem: str) -> list[Path]:
    """Write `<stem>-<provider>.png` for every provider with times; returns their paths."""
    names = dict.fromkeys(name for result in run.results for name in result.outcomes if name != FLOOR.name)
    pictures = []
    for name in names:
        timed = [r for r in run.results if r.outcomes.get(name) is not None and r.outcomes[name].ratio is not None]
        if timed:
            pictures.append(folder / f"{stem}-{name}.png")
            _picture(run, name, timed, pictures[-1])
    return pictures


def _picture(run: Run, name: str, results: list[CaseResult], path: Path) -> None:
    panels: dict[str, list[CaseResult]] = {}
    for result in results:
        panels.setdefault(f"{result.case.variant}, {result.case.group}", []).append(result)
    shapes = max(len({r.case.layer for r in members}) for members in panels.values())
    ranks = max(len({r.case.rank for r in members}) for members in panels.values())
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * (2.9 + 0.62 * ranks), rows * (0.34 * shapes + 1.3) + 0.9), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, members) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, title, name, members)
    machine = run.environment.get("gpu") or run.environment["cpu"]
    figure.suptitle(f"{PROVIDERS[name].label}: time over F.linear, {machine}, {str(run.environment['date'])[:10]}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axis: Axes, title: str, name: str, results: list[CaseResult]) -> None:
    shapes = list(dict.fromkeys(result.case.title for result in results))
    ranks = sorted({result.case.rank for result in results})
    grid = np.full((len(shapes), len(ranks)), np.nan)
    for result in results:
        grid[shapes.index(result.case.title), ranks.index(result.case.rank)] = result.outcomes[name].ratio
    colours = TwoSlopeNorm(1.05, vmin=0.9, vmax=_WORST)
    axis.imshow(np.clip(grid, 0.9, _WORST), norm=colours, cmap="RdYlGn_r", aspect="auto", alpha=0.7)
    for (row, column), ratio in np.ndenumerate(grid):
        if np.isfinite(ratio):
            axis.text(column, row, f"{ratio:.2f}", ha="center", va="center", fontsize=8)
    axis.set_yticks(range(len(shapes)), shapes, fontsize=8)
    axis.set_xticks(range(len(ranks)), [f"r {rank}" for rank in ranks], fontsize=8)
    axis.set_title(title, fontsize=9)
