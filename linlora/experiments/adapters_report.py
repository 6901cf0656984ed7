"""The report of a comparison of adapters: a table, a picture of the searches, a recommendation with its command."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from linlora.experiments.figures import draw_search
from linlora.experiments.options import METHOD_TITLES, in_words
from linlora.experiments.run import Report
from linlora.training.report import percent

DEFAULT = "task_arithmetic"
CAVEAT = (
    "Published comparisons of these methods disagree, and on large language models only task arithmetic gains "
    "reliably: it is recommended unless another method is ahead of it here by more than one standard error."
)
_FITTED = {"lorahub": "lorahub_examples", "soup": "soup_examples"}
"""Methods that are fitted to labels of the validation split, with the option that says to how many."""

_OUTPUTS = {
    "results.json": "every number, by task, with the options that were tried",
    "table.txt": "the table and the recommendation; table.md the same for a README",
    "scalings.png": "validation score against the scaling coefficient λ",
    "rows/": "the scores of every row, and the fused vectors",
}


def report_of(results: Mapping[str, Any], out: Path) -> Report:
    """Draw the searches of a finished comparison; its table and the recommendation."""
    searches = {METHOD_TITLES[row]: of["validation"] for row, of in results["rows"].items() if row in METHOD_TITLES}
    before = statistics.fmean(results["rows"]["backbone"]["chosen_by"])
    of_tasks = f"Fused adapters, scaled by λ, mean of {len(results['tasks'])} tasks"
    draw_search(searches, {"backbone, no adapter": before}, of_tasks, out / "scalings.png")
    words = reading(results)
    return Report([table(results)], words, _OUTPUTS, f"{markdown(results)}\n\n{words}\n")


def table(results: Mapping[str, Any]) -> Table:
    """A row for the backbone, each adapter, and each method: scores of the test splits in %."""
    tasks = results["tasks"]
    title, below = "Test score in %; options chosen on validation", _caption(results)
    view = Table(title=title, title_justify="left", caption=below, caption_justify="left")
    view.add_column("", overflow="fold")
    for heading in (*(tasks if len(tasks) <= 6 else ()), "mean", "normalised"):
        view.add_column(heading, justify="right", overflow="fold")
    view.add_column("options", overflow="fold")
    for rows in (_unfused(results), _fused(results)):
        for title, cells in rows:
            view.add_row(title, *(cells if len(tasks) <= 6 else cells[len(tasks) :]))
        view.add_section()
    return view


def markdown(results: Mapping[str, Any]) -> str:
    """The table for a README, with every task."""
    headings = ["", *results["tasks"], "mean", "normalised", "options"]
    rows = ([title, *cells] for title, cells in itertools.chain(_unfused(results), _fused(results)))
    lines = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


Rows = Iterable[tuple[str, list[str]]]
"""Titles with cells: a score for each task, their mean, the normalised score, options."""


def _unfused(results: Mapping[str, Any]) -> Rows:
    rows, of = results["rows"], results["single"]
    yield "backbone, no adapter", _cells(rows["backbone"])
    for i, title in enumerate(_titles(results["adapters"]), 1):
        yield title, _cells(rows[f"adapter-{i}"])
    whose = "own adapter of each task" if of["own"] else "best adapter of each task"
    yield whose, _cells({"test": of["test"], "normalised": 1.0, "options": {}})


def _fused(results: Mapping[str, Any]) -> Rows:
    return ((METHOD_TITLES[key], _cells(row)) for key, row in results["rows"].items() if key in METHOD_TITLES)


def _cells(row: Mapping[str, Any]) -> list[str]:
    scores = (*row["test"], statistics.fmean(row["test"]), row["normalised"])
    return [*map(percent, scores), in_words(row["options"])]


def _titles(adapters: list[str]) -> list[str]:
    """The names of folders or files; whole paths where two have one name.

    >>> _titles(["runs/films", "runs/mood"]), _titles(["films/seed0", "mood/seed0"])
    (['films', 'mood'], ['films/seed0', 'mood/seed0'])
    """
    names = [Path(adapter).name for adapter in adapters]
    return names if len({*names}) == len(names) else adapters


def _caption(results: Mapping[str, Any]) -> str:
    where = "as what they add to the weights" if results["scope"] == "weight" else "at their starting point"
    over = "the task's own adapter" if results["single"]["own"] else "the best adapter of the task, by validation"
    left = "".join(f"\nLeft out: {METHOD_TITLES[method]} {reason}." for method, reason in results["left_out"].items())
    return f"The adapters are added {where}. Normalised: over {over}.{left}"


def reading(results: Mapping[str, Any]) -> str:
    """The recommendation, in a sentence, with its command."""
    rows, chosen = results["rows"], results["recommendation"]
    row, mean = rows[chosen["method"]], {name: statistics.fmean(row["test"]) for name, row in rows.items()}
    single = statistics.fmean(results["single"]["test"])
    options = in_words(row["options"])
    beside = f", the plain average {percent(mean['average'])}" if "average" in mean else ""
    if row["options"].get("scaling") == 0:
        return (
            "Recommended: the base model without adapters, for no method is clearly better on validation. It scores "
            f"{percent(mean['backbone'])} % on test{beside}, one adapter for each task {percent(single)}."
        )
    fitted = _FITTED.get(chosen["method"])
    seen = f" It was fitted to {results['options'][fitted]} of the labels it was chosen by." if fitted else ""
    return (
        f"Recommended: {METHOD_TITLES[chosen['method']]}{f' ({options})' if options else ''}. It scores "
        f"{percent(mean[chosen['method']])} % on test; the backbone {percent(mean['backbone'])}{beside}, one adapter "
        f"for each task {percent(single)}.{seen}\n{CAVEAT}\n  {chosen['command']}"
    )
