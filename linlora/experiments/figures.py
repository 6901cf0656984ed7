"""The pictures: scores by method and control, accuracy against scaling, cosines, and maps of disentanglement."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from linlora.experiments.controls import SHORT
from linlora.experiments.options import METHOD_TITLES
from linlora.fusion.figures import save

# Okabe and Ito's palette, told apart by the colour-blind; the markers differ too.
_STYLES = {
    "factors": ("#D55E00", "o"), "delta_weight": ("#E69F00", "D"), "lora_fa": ("#CC79A7", "v"),
    "layer": ("#0072B2", "s"), "model": ("#009E73", "^"),
    "features": ("#56B4E9", "P"),
}  # fmt: skip


def draw_all(results: Mapping[str, Any], out: Path) -> None:
    entries = [entry for start in results["starts"].values() for entry in start["controls"].values()]
    if any(_curve(entry) for entry in entries):
        draw_scalings(results, out / "scalings.png")
    draw_scores(results, out / "scores.png")
    draw_cosines(results, out / "cosines.png")
    if all(entry["map"] for entry in entries):
        draw_maps(results, out / "disentanglement.png")


def draw_scalings(results: Mapping[str, Any], path: Path) -> None:
    """Validation score of task arithmetic against λ, on which λ is chosen, with the backbone as a line."""
    starts = results["starts"].values()
    figure = Figure(figsize=(8.0 * len(starts), 4.5), layout="constrained")
    panels = figure.subplots(1, len(starts), sharey=True, squeeze=False)[0]
    for axes, start in zip(panels, starts, strict=True):
        added_whole, before = {}, None
        for key, entry in start["controls"].items():
            if not (points := _curve(entry)):
                continue
            color, marker = _STYLES[key]
            scalings = [point["options"]["scaling"] for point in points]
            mean = 100 * np.array([point["mean"] for point in points])
            std = 100 * np.array([point["std"] or 0.0 for point in points])
            axes.plot(scalings, mean, color=color, marker=marker, markersize=5, linewidth=2, label=SHORT[key])
            axes.fill_between(scalings, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
            at = dict(zip(scalings, mean, strict=True))
            before = at.get(0.0, before)
            if 1.0 in at:
                added_whole[SHORT[key]] = at[1.0]
        if before is not None:
            axes.axhline(before, color="0.35", linestyle="--", linewidth=1.5, label="backbone, not fine-tuned")
        axes.set_title(_takeaway(start["title"] if len(starts) > 1 else "", added_whole), fontsize=14)
        axes.set_xlabel("scaling coefficient λ", fontsize=13)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.25)
        axes.margins(x=0.02)
    panels[0].set_ylabel(f"validation score (%), mean of {len(results['tasks'])} tasks", fontsize=12)
    curves = panels[-1].get_legend_handles_labels()  # of the start with all controls
    figure.legend(*curves, loc="outside lower center", ncols=3 * len(panels), fontsize=12, frameon=False)
    save(figure, path)


def _takeaway(start: str, added_whole: Mapping[str, float]) -> str:
    """The title of a panel: the ends of the curves.

    >>> _takeaway("", {"LoRA factors": 24.0, "model scope": 77.0})
    'Validation score at λ = 1: model scope 77 %, LoRA factors 24 %'
    """
    if len(added_whole) < 2:
        return start or "Fused adapters, scaled by λ"
    best, worst = max(added_whole, key=added_whole.__getitem__), min(added_whole, key=added_whole.__getitem__)
    what = f"{start}, validation score" if start else "Validation score"
    return f"{what} at λ = 1: {best} {added_whole[best]:.0f} %, {worst} {added_whole[worst]:.0f} %"


def draw_search(
    searches: Mapping[str, Sequence[Mapping[str, Any]]], references: Mapping[str, float], title: str, path: Path
) -> bool:
    """The best validation score that each search found at each λ, with lines for others; False where none has two."""
    curves: dict[str, dict[float, float]] = {}
    for name, points in searches.items():
        for point in points:
            if isinstance(scaling := point["options"].get("scaling"), (int, float)):
                of = curves.setdefault(name, {})
                of[scaling] = max(of.get(scaling, -np.inf), 100 * float(np.mean(point["scores"])))
    if max(map(len, curves.values()), default=0) < 2:
        return False
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(*zip(*sorted(curve.items()), strict=True), marker="o", markersize=4, label=name)
    for (name, score), style in zip(references.items(), ("--", ":"), strict=False):
        axes.axhline(100 * score, color="0.35", linestyle=style, linewidth=1.5, label=name)
    axes.set_xlabel("scaling coefficient λ", fontsize=12)
    axes.set_ylabel("mean validation score (%)", fontsize=12)
    axes.set_title(title, fontsize=13)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=10, framealpha=0.9, edgecolor="white")
    save(figure, path)
    return True


def draw_scores(results: Mapping[str, Any], path: Path) -> None:
    """Normalised test score of every method and control, mean and standard deviation over seeds."""
    starts = results["starts"].values()
    known = {method for start in starts for entry in start["controls"].values() for method in entry["methods"]}
    methods = [method for method in METHOD_TITLES if method in known]
    figure = Figure(figsize=(1.8 + 1.7 * len(methods), 3.6 * len(starts)), layout="constrained")
    panels = figure.subplots(len(starts), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, start in zip(panels, starts, strict=True):
        keys = list(start["controls"])
        for i, key in enumerate(keys):
            color, marker = _STYLES[key]
            found = [start["controls"][key]["methods"].get(method) for method in methods]
            x = np.arange(len(methods)) + 0.14 * (i - (len(keys) - 1) / 2)
            values = [of["normalised"] if of else {"mean": None, "std": None} for of in found]
            mean = 100 * np.array([np.nan if value["mean"] is None else value["mean"] for value in values])
            std = 100 * np.array([value["std"] or 0.0 for value in values])
            axes.errorbar(x, mean, std, color=color, marker=marker, linestyle="", capsize=3, label=SHORT[key])
        for edge in np.arange(len(methods) - 1) + 0.5:
            axes.axvline(edge, color="0.9", linewidth=1)
        axes.set_title(start["title"], fontsize=11)
        axes.set_ylabel("normalised score (%)")
        axes.set_xlim(-0.5, len(methods) - 0.5)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(fontsize=8, ncols=len(keys), loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    titles = [METHOD_TITLES[method].replace("task arithmetic, ", "task arithmetic,\n") for method in methods]
    panels[-1].set_xticks(range(len(methods)), titles)
    for axes in panels:
        axes.tick_params(labelbottom=True)
    over = f"; bars: ± std over {results['seeds']} seeds" if results["seeds"] > 1 else ""
    what = f"fused / single-task test score, mean of {len(results['tasks'])} tasks{over}"
    best = {
        f"{SHORT[key]} by {METHOD_TITLES[method]}": 100 * of["normalised"]["mean"]
        for start in starts for key, entry in start["controls"].items() for method, of in entry["methods"].items()
        if of["normalised"]["mean"] is not None
    }  # fmt: skip
    most = max(best, key=best.__getitem__, default=None)
    kept = f"Most of the single-task scores is kept with {most}: {best[most]:.0f} %\n" if most else ""
    figure.suptitle(kept + what, fontsize=11)
    save(figure, path)


def draw_cosines(results: Mapping[str, Any], path: Path) -> None:
    """The cosines between what each control adds, mean over seeds, in one colour scale."""
    starts, tasks = results["starts"].values(), results["tasks"]
    own = np.eye(len(tasks), dtype=bool)
    panels = [(start["title"], key, np.array(c["cosine"])) for start in starts for key, c in start["controls"].items()]
    limit = max(0.05, *(float(np.abs(matrix[~own]).max(initial=0.0)) for *_, matrix in panels))
    figure, grid = _grid(results, 2.3 + 0.12 * len(tasks), 2.7)
    means = {}
    for axes, (title, key, matrix) in zip(grid, panels, strict=True):
        axes.set_facecolor("0.85")
        image = axes.imshow(np.ma.array(matrix, mask=own), cmap="PuOr_r", vmin=-limit, vmax=limit)
        for i, j in np.argwhere(~own):
            dark = abs(matrix[i, j]) > 0.65 * limit
            axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=6, color="w" if dark else "k")
        axes.set_xticks(range(len(tasks)), range(1, len(tasks) + 1), fontsize=7)
        axes.set_yticks(range(len(tasks)), range(1, len(tasks) + 1), fontsize=7)
        mean = means[title, key] = np.abs(matrix[~own]).mean() if len(tasks) > 1 else 0.0
        axes.set_title(f"{SHORT[key]}\n{title}, mean |cosine| {mean:.3f}", fontsize=8)
    figure.colorbar(image, ax=list(grid), label="cosine", shrink=0.7)
    named = textwrap.fill(", ".join(f"{i}\u00a0{task}" for i, task in enumerate(tasks, 1)), 110, break_on_hyphens=False)
    (_, most), (_, least) = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    figure.suptitle(
        f"Task vectors have a mean |cosine| of {min(means.values()):.3f} ({SHORT[least]}) to {max(means.values()):.3f} "
        f"({SHORT[most]})\n{named}",
        fontsize=9,
    )
    save(figure, path)


def draw_maps(results: Mapping[str, Any], path: Path) -> None:
    """The disentanglement error ξ(λ1, λ2) of the first two tasks, in one colour scale; the box is [0, 1]²."""
    starts = results["starts"].values()
    panels = [(start["title"], key, c["map"]) for start in starts for key, c in start["controls"].items()]
    errors = [np.array(found["rates"]).sum(axis=0) for *_, found in panels]
    limit = max(0.1, max(error.max() for error in errors))
    figure, grid = _grid(results, 2.6, 3.0)
    for axes, (title, key, found), error in zip(grid, panels, errors, strict=True):
        scalings = np.array(found["scalings"])
        mesh = axes.pcolormesh(scalings, scalings, error.T, shading="nearest", cmap="viridis", vmin=0.0, vmax=limit)
        axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color="#D55E00", linewidth=1.2)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7)
        axes.set_title(f"{SHORT[key]}\n{title}, mean ξ {error.mean():.3f}", fontsize=8)
    figure.colorbar(mesh, ax=list(grid), label="ξ: rate of disagreement, both tasks", shrink=0.7)
    first, second = results["tasks"][:2]
    means = [error.mean() for error in errors]
    least, most = (SHORT[panels[int(chosen(means))][1]] for chosen in (np.argmin, np.argmax))
    figure.suptitle(
        f"Two fused tasks disagree with each alone least with {least} (mean ξ {min(means):.2f}), most with {most} "
        f"({max(means):.2f})\nλ1 of {first} to the right, λ2 of {second} upwards",
        fontsize=9,
    )
    save(figure, path)


def _grid(results: Mapping[str, Any], width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure with a row of panels for each start and a column for each control; the panels in order.

    A control that a start lacks has a sentence in its place.
    """
    starts = list(results["starts"].values())
    keys = [key for key in SHORT if any(key in start["controls"] for start in starts)]
    figure = Figure(figsize=(1.2 + width * len(keys), 0.7 + height * len(starts)), layout="constrained")
    panels = []
    for row, start in zip(figure.subplots(len(starts), len(keys), squeeze=False), starts, strict=True):
        for axes, key in zip(row, keys, strict=True):
            if key in start["controls"]:
                panels.append(axes)
            else:
                axes.set_axis_off()
                axes.text(0.5, 0.5, f"{start['title']}:\n{SHORT[key]} is\nlayer scope", ha="center", va="center")
    return figure, panels


def _curve(entry: Mapping[str, Any]) -> list[Any]:
    """The points of the search of task arithmetic, by λ; none if it was not searched."""
    points = entry["methods"].get("task_arithmetic", {}).get("validation", [])
    return sorted(points, key=lambda point: point["options"]["scaling"])
