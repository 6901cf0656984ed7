"""Pictures of a run: time over the frozen layer for every case, and as the rank grows."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .providers import FLOOR, PROVIDERS
from .results import CaseResult, Run

# Okabe and Ito's colours, which colour-blind readers tell apart; the marker says the same once more.
_STYLES = {
    "linlora-model-triton": ("#D55E00", "*"),
    "linlora-model-torch": ("#56B4E9", "*"),
    "linlora-cuda": ("#D55E00", "P"),
    "linlora-triton": ("#D55E00", "o"),
    "linlora-torch": ("#0072B2", "D"),
    "addmm": ("#009E73", "^"),
    "peft": ("#CC79A7", "s"),
    "functorch-ab": ("#E69F00", "v"),
    "functorch-all": ("#000000", "X"),
    "functorch": ("#000000", "x"),
    "jvp-flash": ("#F0E442", "v"),
    "poly": ("#009E73", "X"),
    "peft-loop": ("#E69F00", "s"),
}
_CALLS = "cost of a call (8 → 8 features)"
_TICKS = [0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500]
_TICKS_OF_AN_AXIS = 9


def plot_run(run: Run, folder: Path, stem: str) -> list[Path]:
    """Write `<stem>-ratios.png` and, where a layer ran at several ranks, `<stem>-ranks.png`; returns their paths.

    Raises ValueError when no case of the run has a time.
    """
    results = [result for result in run.results if _ratios(result)]
    if not results:
        raise ValueError("no case of this run has a time: there is nothing to draw")
    figures = {"ratios": _figure_of_ratios(run, results), "ranks": _figure_of_ranks(run, results)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, figure in figures.items():
        if figure is not None:
            path = folder / f"{stem}-{kind}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            paths.append(path)
    return paths


def _figure_of_ratios(run: Run, results: list[CaseResult]) -> Figure:
    panels = defaultdict(list)
    for result in results:
        title = _CALLS if result.case.model == "tiny" else result.case.group
        panels[title].append(result)
    alone = {title for title, members in panels.items() if title == _CALLS or members[0].case.kind == "stream"}
    for title in sorted(alone):  # far from the floor: below the others, which share their axis
        panels[title] = panels.pop(title)
    heights = [len(members) + 1.6 for members in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 0.36 * sum(heights) + 1.5), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    layers = [result for title, members in panels.items() for result in members if title not in alone]
    for axis, (title, members) in zip(axes[:, 0], panels.items(), strict=True):
        for row, result in enumerate(reversed(members)):
            for name, ratio in reversed(_ratios(result).items()):  # linlora last, on top
                colour, marker = _STYLES[name]
                axis.plot(ratio, row, marker, color=colour, markersize=7, alpha=0.85)
        axis.set_yticks(range(len(members)), [_label(result) for result in reversed(members)])
        axis.set_ylim(-0.6, len(members) - 0.4)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axis.axvline(1, color="#555555", linewidth=1.2)
        axis.grid(axis="y", color="#E5E5E5")
        _log_axis(axis, members if title in alone else layers)
    axes[-1, 0].set_xlabel("time over the floor (frozen nn.Linear, model or primal; log scale)")
    _legend(figure, results)
    figure.suptitle(_title(run), fontsize=12)
    return figure


def _figure_of_ranks(run: Run, results: list[CaseResult]) -> Figure | None:
    groups = defaultdict(list)
    for result in results:
        case = result.case
        groups[f"{case.title}, {case.variant}, {case.group}"].append(result)
    series = {title: members for title, members in groups.items() if len({r.case.rank for r in members}) > 1}
    if not series:
        return None
    figure, axes = plt.subplots(
        1, len(series), figsize=(max(5.5 * len(series), 7), 4.8), squeeze=False, layout="constrained"
    )  # fmt: skip
    for axis, (title, members) in zip(axes[0], series.items(), strict=True):
        members.sort(key=lambda result: result.case.rank)
        for name in reversed(_shown(members)):
            points = [(r.case.rank, _ratios(r)[name]) for r in members if name in _ratios(r)]
            colour, marker = _STYLES[name]
            axis.plot(*zip(*points, strict=True), marker=marker, color=colour, markersize=7)
        axis.axhline(1, color="#555555", linewidth=1.2)
        axis.set_xscale("log", base=2)
        axis.set_xticks([r.case.rank for r in members], [str(r.case.rank) for r in members])
        axis.set_ylim(bottom=min(0.95, *(ratio for r in members for ratio in _ratios(r).values())))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rank")
        axis.grid(color="#E5E5E5")
    axes[0, 0].set_ylabel("time over the frozen nn.Linear")
    _legend(figure, [result for members in series.values() for result in members])
    figure.suptitle(_title(run), fontsize=12)
    return figure


def _ratios(result: CaseResult) -> dict[str, float]:
    """Time over the floor of every provider that has a place in the pictures."""
    outcomes = {name: result.outcomes[name] for name in _STYLES if name in result.outcomes}
    return {name: outcome.ratio for name, outcome in outcomes.items() if outcome.ratio is not None}


def _shown(results: list[CaseResult]) -> list[str]:
    return [name for name in _STYLES if any(name in _ratios(result) for result in results)]


def _label(result: CaseResult) -> str:
    case = result.case
    phase = f", {case.group}" if case.model == "tiny" else ""
    return f"{case.title}, r {case.rank}, {case.variant}{phase}" if case.rank else case.title


def _log_axis(axis: Axes, results: list[CaseResult]) -> None:
    ratios = [ratio for result in results for ratio in _ratios(result).values()]
    low, high = min(0.97, *ratios) * 0.97, max(ratios) * 1.08
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    while len(ticks) > _TICKS_OF_AN_AXIS:
        one = ticks.index(1)
        ticks = [tick for i, tick in enumerate(ticks) if (i - one) % 2 == 0]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, results: list[CaseResult]) -> None:
    shown = _shown(results)
    handles = [
        plt.Line2D([], [], color=_STYLES[name][0], marker=_STYLES[name][1], linestyle="", markersize=7)
        for name in shown
    ]
    labels = [re.sub("^jvp ", "torch.func.jvp, ", PROVIDERS[name].label) for name in shown]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(shown), 5),
        frameon=False,
        fontsize=9,
        columnspacing=1.2,
    )


def _title(run: Run) -> str:
    about = run.environment
    dtypes = sorted({result.case.dtype for result in run.results})
    machine = about.get("gpu") or f"{about['cpu']}, {about['threads']} thread(s)"
    return f"linlora over {PROVIDERS[FLOOR.name].label}: {machine}, {', '.join(dtypes)}, {str(about['date'])[:10]}"
