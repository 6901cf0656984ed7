"""The pictures: accuracy by method, and what the routing learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from linlora.fusion.figures import save
from linlora.quickstart.routing.methods import ADAPTATIONS

_COLORS = {None: "#D55E00", "layer": "#0072B2", "model": "#009E73"}  # by scope; Okabe and Ito's palette


def draw_accuracies(results: dict[str, Any], path: Path) -> None:
    """A dot for every method and number of images, with its deviation over seeds."""
    shots = results["settings"]["shots"]
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    panels = figure.subplots(1, len(shots), sharey=True, squeeze=False)[0]
    names = list(ADAPTATIONS)[::-1]
    before = 100 * sum(results["before"]) / len(results["before"])
    for axes, count in zip(panels, shots, strict=True):
        for place, name in enumerate(names):
            score, color = results["methods"][name][str(count)]["test"], _COLORS[ADAPTATIONS[name].scope]
            axes.errorbar(
                100 * score["mean"], place, xerr=100 * (score["std"] or 0.0), fmt="o", color=color, markersize=6,
                capsize=3,
            )  # fmt: skip
        axes.axvline(before, color="0.4", linestyle=":", linewidth=1.4)
        axes.set_title(f"{count} labelled images a task")
        axes.set_xlabel(f"test accuracy, mean of {len(results['held_out'])} held-out tasks (%)")
        axes.grid(alpha=0.25)
    panels[0].set_yticks(range(len(names)), [ADAPTATIONS[name].title for name in names])
    for scope, label in ((None, "plain"), ("layer", "layer scope"), ("model", "model scope")):
        panels[-1].plot([], [], "o", color=_COLORS[scope], label=label)
    panels[-1].plot([], [], color="0.4", linestyle=":", linewidth=1.4, label="before adaptation")
    panels[-1].legend(fontsize=9, loc="best")
    save(figure, path)


def draw_routing(results: dict[str, Any], path: Path) -> None:
    """Left, the weights of the skills for every trained task in one layer; right, how alike all layers route two."""
    routing, tasks = results["routing"], results["trained"]
    weights, alike = np.array(routing["weights"]), np.array(routing["alike"])
    _, heads, skills = weights.shape
    figure = Figure(figsize=(13.5, 0.25 * len(tasks) + 2.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    image = left.imshow(weights.reshape(len(tasks), -1), cmap="viridis", aspect="auto", vmin=0.0)
    for head in range(1, heads):
        left.axvline(head * skills - 0.5, color="white", linewidth=2)
    left.set_yticks(range(len(tasks)), tasks, fontsize=8)
    left.set_xticks([head * skills + (skills - 1) / 2 for head in range(heads)], [f"head {h}" for h in range(heads)])
    left.set_title(f"weights of the {skills} skills\nin {routing['layer'].removeprefix('vit.')}", fontsize=10)
    figure.colorbar(image, ax=left, shrink=0.8)
    limit = max(0.05, float(np.abs(alike[~np.eye(len(tasks), dtype=bool)]).max()))
    masked = np.ma.array(alike, mask=np.eye(len(tasks), dtype=bool))
    right.set_facecolor("0.85")
    image = right.imshow(masked, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    right.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=8)
    right.set_title("how alike two tasks are routed, all layers\n(cosine of weights less their mean)", fontsize=10)
    figure.colorbar(image, ax=right, shrink=0.8)
    save(figure, path)
