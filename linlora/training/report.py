"""What `linlora train` and `linlora eval` print."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from linlora.training.folder import Run

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
    """The commands one is likely to want now."""
    folders = " ".join(str(run.folder) for run in runs)
    if len(runs) > 1:
        return f"next: linlora eval {folders} --fuse task_arithmetic --search"
    split = "" if "test" in runs[0].metrics else " --split validation"
    lines = [f"next: linlora eval {folders}{split}"]
    if runs[0].settings.method != "model":
        lines.append(f"      PeftModel.from_pretrained(base, '{folders}') loads the adapter without linlora")
    return "\n".join(lines)


def evaluated(result: Mapping[str, Any]) -> Table:
    """A row for each task: its score; where its run is known, the score of that and the one over the other."""
    single = any(of_task.get("single") is not None for of_task in result["tasks"].values())
    keys = ("single", "score", "normalised") if single else ("score",)
    view = Table(title=_title(result), title_justify="left")
    view.add_column("task")
    view.add_column("metric")
    for heading in ("rows", *(("single %", "fused %", "fused / single %") if single else ("score %",))):
        view.add_column(heading, justify="right")
    for name, of_task in result["tasks"].items():
        view.add_row(name, of_task["metric"], str(of_task["rows"]), *(percent(of_task[key]) for key in keys))
    if len(result["tasks"]) > 1:
        view.add_section()
        view.add_row("mean", "", "", *(percent(result["mean"][key]) for key in keys))
    return view


def _title(result: Mapping[str, Any]) -> str:
    if result["method"] is None:
        return f"{result['split']} split"
    options = ", ".join(f"{name} {value}" for name, value in result["options"].items())
    return f"{result['split']} split, fused by {result['method']}" + (f" ({options})" if options else "")


def _mean_score(runs: Sequence[Run], split: str) -> str:
    scores = [run.metrics[split]["score"] for run in runs if split in run.metrics]
    return percent(statistics.fmean(scores)) if len(scores) == len(runs) else "–"


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"
