"""The table and the hints that `linlora train` prints."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence

from rich.table import Table

from linlora.training.folder import Run
from linlora.training.suite import different_models

_SPLITS = ("validation", "test")


def trained(runs: Sequence[Run]) -> Table:
    """A row for each run: what it scores, and how long it took."""
    splits = [split for split in _SPLITS if any(split in run.metrics for run in runs)]
    view = Table(title="Trained", title_justify="left")
    for heading in ("task", "method", "metric"):
        view.add_column(heading)
    for heading in (*(f"{split} %" for split in splits), "seconds"):
        view.add_column(heading, justify="right")
    for run in runs:
        scores = [percent(run.metrics[split]["score"]) if split in run.metrics else "–" for split in splits]
        m = run.metrics
        view.add_row(m["task"], m["method"], m["metric"], *scores, f"{m['seconds']:.0f}")
    if len(runs) > 1:
        view.add_section()
        view.add_row("mean", "", "", *(_mean_score(runs, split) for split in splits), "")
    return view


def what_next(runs: Sequence[Run]) -> str:
    """Where the runs are, and the commands one is likely to want now; each works as it stands."""
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
    written = f"written to {' and '.join(str(run.folder) for run in runs)}"
    return "\n".join([written, "next:", *(f"  {line}" for line in lines), *(f"note: {note}" for note in notes)])


def _mean_score(runs: Sequence[Run], split: str) -> str:
    scores = [run.metrics[split]["score"] for run in runs if split in run.metrics]
    return percent(statistics.fmean(scores)) if len(scores) == len(runs) else "–"


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"
