"""The two pictures: scaling coefficient against accuracy, and the cosines between task vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from linlora.quickstart.settings import FAMILIES, FAMILY_TITLES

# Okabe and Ito's palette, told apart by the colour-blind; the markers differ too.
_STYLES = {"lora": ("#D55E00", "o"), "layer": ("#0072B2", "s"), "model": ("#009E73", "^")}
_DASHED = (0, (5, 3))


def draw_scaling_curve(results: dict[str, Any], path: Path) -> None:
    """Validation accuracy of Σ λ δ over the grid of λ, on which λ is chosen: mean and standard deviation over seeds."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for family in FAMILIES:
        entry, (color, marker) = results["families"][family], _STYLES[family]
        scalings = np.array(entry["scalings"])
        mean = 100 * np.array([point["mean"] for point in entry["curve_validation"]])
        std = 100 * np.array([point["std"] or 0.0 for point in entry["curve_validation"]])
        axes.plot(scalings, mean, color=color, marker=marker, markersize=5, label=FAMILY_TITLES[family])
        axes.fill_between(scalings, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)
        single = 100 * entry["single_validation"]["mean"]
        axes.axhline(single, color=color, linestyle=_DASHED, linewidth=1.2)
    tasks = len(results["tasks"])
    axes.plot([], [], color="0.4", linestyle=_DASHED, linewidth=1.2, label="single-task adapters, same colours")
    axes.axvline(1 / tasks, color="0.4", linestyle=":", linewidth=1.4, label=f"simple average (λ = 1/{tasks})")
    axes.set_xlabel("scaling coefficient λ of every task vector (λ = 0: the pre-trained backbone)")
    axes.set_ylabel(f"validation accuracy, mean of {tasks} tasks (%)")
    band = f"; band: ± std over {results['seeds']} seeds" if results["seeds"] > 1 else ""
    axes.set_title(f"Task arithmetic: accuracy against scaling{band}")
    axes.set_xlim(scalings[0], scalings[-1])
    axes.grid(alpha=0.25)
    axes.legend(framealpha=1, edgecolor="white", fontsize=9, loc="lower left")
    save_figure(figure, path)


def draw_cosine_matrices(results: dict[str, Any], path: Path) -> None:
    """Cosines between the task vectors of one seed, averaged over seeds, in one colour scale for all families.

    The diagonal is 1 by definition and left grey, so that the colours serve the cosines one came to see.
    """
    tasks = results["tasks"]
    own = np.eye(len(tasks), dtype=bool)
    matrices = {family: np.array(results["families"][family]["cosine"]) for family in FAMILIES}
    limit = max(0.05, max((np.abs(matrix[~own]).max() for matrix in matrices.values()), default=0.05))
    figure = Figure(figsize=(5.6 + 1.7 * len(tasks), 2.9 + 0.55 * len(tasks)), layout="constrained")
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    for axes, family in zip(panels, FAMILIES, strict=True):
        masked = np.ma.array(matrices[family], mask=own)
        axes.set_facecolor("0.85")
        image = axes.imshow(masked, cmap="PuOr_r", vmin=-limit, vmax=limit)
        for i, j in np.argwhere(~own):
            value = matrices[family][i, j]
            color = "white" if abs(value) > 0.65 * limit else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
        for i in range(len(tasks)):
            axes.text(i, i, "1", ha="center", va="center", fontsize=9, color="0.4")
        axes.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(tasks)), tasks)
        mean = np.abs(matrices[family][~own]).mean() if len(tasks) > 1 else 0.0
        axes.set_title(f"{FAMILY_TITLES[family]}\n(mean |cosine| {mean:.3f})")
    figure.colorbar(image, ax=list(panels), label="cosine", shrink=0.8)
    over_seeds = f", mean over {results['seeds']} seeds" if results["seeds"] > 1 else ""
    figure.suptitle(f"Cosine between task vectors{over_seeds}")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Through the Agg canvas and not pyplot, so that no display is needed and no global state is touched."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
