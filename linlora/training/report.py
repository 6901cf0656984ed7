"""What `linlora train` and `linlora eval` print."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from linlora.training.folder import Run
from linlora.training.fused import in_words
from linlora.training.suite import different_models

_SPLITS = ("validation", "test")


def trained(runs: Sequence[Run]) -> Table:
    """A row for each run: what it scores, how long it took, and where it is."""
    splits = [split for split in _SPLITS if any(split in run.metrics for run in runs)]
    view = Table(title="Trained", title_justify="left")
    for heading in ("task", "method", "metric"):
        view.add_column(heading)
    for heading in (*(f"{split} %" for split in splits), "seconds"):
        view.add_column(heading, justify="right")
    view.add_column("folder", overflow="fold")
    for run in runs:
        scores = [percent(run.metrics[split]["score"]) if split in run.metrics else "–" for split in splits]
        m = run.metrics
        view.add_row(m["task"], m["method"], m["metric"], *scores, f"{m['seconds']:.0f}", str(run.folder))
    if len(runs) > 1:
        view.add_section()
        view.add_row("mean", "", "", *(_mean_score(runs, split) for split in splits), "", "")
    return view


def what_next(runs: Sequence[Run]) -> str:
    """The commands one is likely to want now; each works as it stands."""
    folders = shlex.join(str(run.folder) for run in runs)
    tested = all("test" in run.metrics for run in runs)
    split = "" if tested else " --split validation"
    first = runs[0]
    if len(runs) == 1:
        lines = [f"linlora eval {folders}{split}", f"linlora inspect {folders}"]
    else:
        lines = [f"linlora eval {folders}{split}"]
        if not any(different_models(first.settings, run.settings) for run in runs[1:]):
            lines.append(f"linlora eval {folders} --fuse task_arithmetic --search{split}")
            of_runs = first.folder.parent  # beside it: in it, FOLDER/* would take the fused vector for a run
            fused = of_runs.with_name(f"{of_runs.name}-fused.safetensors") if of_runs.name else "fused.safetensors"
            lines.append(f"linlora fuse {folders} --scaling 0.3 --out {shlex.quote(str(fused))}")
    notes = [] if tested else ["a test split is added by the same command with --test"]
    notes.append(f"how to load it: {first.folder / 'README.md'}")
    return "\n".join(["next:", *(f"  {line}" for line in lines), *(f"note: {note}" for note in notes)])


def evaluated(result: Mapping[str, Any]) -> Table:
    """A row for each task: its score; where its run is known, the score of that and the one over the other."""
    single = any(of_task.get("single") is not None for of_task in result["tasks"].values())
    references = {name: of[result["split"]] for name, of in (result.get("references") or {}).items()}
    keys = ("single", "score", "normalised") if single else ("score",)
    view = Table(title=_title(result), title_justify="left")
    view.add_column("task")
    view.add_column("metric")
    headings = ("single %", "fused %", "fused / single %") if single else ("score %",)
    for heading in ("rows", *(f"{name} %" for name in references), *headings):
        view.add_column(heading, justify="right")
    for i, (name, of_task) in enumerate(result["tasks"].items()):
        others = [percent(scores[i]) for scores in references.values()]
        view.add_row(name, of_task["metric"], str(of_task["rows"]), *others, *(percent(of_task[key]) for key in keys))
    if len(result["tasks"]) > 1:
        view.add_section()
        others = [percent(statistics.fmean(scores)) for scores in references.values()]
        view.add_row("mean", "", "", *others, *(percent(result["mean"][key]) for key in keys))
    return view


def searched(result: Mapping[str, Any]) -> Table:
    """A row for each point of a search, with the backbone and the average before; the best one is marked."""
    view = Table(title="search, validation %", title_justify="left")
    view.add_column("")
    for name in (*result["tasks"], "mean"):
        view.add_column(name, justify="right")
    for name, scores in result["references"].items():
        view.add_row(name, *map(percent, scores["validation"]), percent(statistics.fmean(scores["validation"])))
    view.add_section()
    for point in result["search"]:
        mark = " ←" if point["options"] == result["options"] else ""
        mean = percent(statistics.fmean(point["scores"])) + mark
        view.add_row(in_words(point["options"]), *map(percent, point["scores"]), mean)
    return view


def draw_search(result: Mapping[str, Any], path: Path) -> bool:
    """Mean validation score against the scaling, a line for each choice of the other options; False without one."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for point in result["search"]:
        options = dict(point["options"])
        if isinstance(scaling := options.pop("scaling", None), (int, float)):
            lines.setdefault(in_words(options), []).append((scaling, 100 * statistics.fmean(point["scores"])))
    if max(map(len, lines.values()), default=0) < 2:
        return False
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name or result["method"])
    for (name, scores), style in zip(result["references"].items(), (":", "--"), strict=True):
        axes.axhline(100 * statistics.fmean(scores["validation"]), color="gray", linestyle=style, label=name)
    title = f"{result['method']} of {len(result['vectors'])} vectors"
    axes.set(xlabel="scaling λ", ylabel="mean validation score in %", title=title)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def _title(result: Mapping[str, Any]) -> str:
    if result["method"] is None:
        return f"{result['split']} split"
    options = in_words(result["options"])
    return f"{result['split']} split, fused by {result['method']}" + (f" ({options})" if options else "")


def _mean_score(runs: Sequence[Run], split: str) -> str:
    scores = [run.metrics[split]["score"] for run in runs if split in run.metrics]
    return percent(statistics.fmean(scores)) if len(scores) == len(runs) else "–"


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"
