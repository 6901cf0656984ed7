"""What the user reads: a table for each start, what the controls differ by, and a few sentences from the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from linlora.comparison.results import paired
from linlora.comparison.settings import METHOD_TITLES
from linlora.quickstart.report import percent

SHORT = {
    "factors": "LoRA factors", "delta_weight": "LoRA ΔW", "lora_fa": "LoRA-FA", "layer": "layer scope",
    "model": "model scope",
}  # fmt: skip


def tables(results: Mapping[str, Any]) -> list[Table]:
    """For each start the scores in %, and the paired differences of the normalised ones in points."""
    return [make(results, start) for start in results["starts"].values() for make in (score_table, difference_table)]


def score_table(results: Mapping[str, Any], start: Mapping[str, Any]) -> Table:
    controls = start["controls"]
    title = f"{start['title']}: test score in %, mean of {len(results['tasks'])} tasks{_over(results)}"
    view = Table(title=title, caption=start["note"])
    view.add_column("", no_wrap=True)
    for key in controls:
        view.add_column(SHORT[key].replace(" ", "\n"), justify="right", no_wrap=True)
    view.add_row("before", *(spread(entry["before"]) for entry in controls.values()))
    view.add_row("single task", *(spread(entry["single"]) for entry in controls.values()))
    for method in _methods(start):
        found = [entry["methods"][method] for entry in controls.values()]
        view.add_row(METHOD_TITLES[method], *(spread(of["absolute"]) for of in found))
        view.add_row("  normalised", *(spread(of["normalised"]) for of in found))
    forgetting = [entry["negation"] for entry in controls.values()]
    view.add_row("negated task", *(spread(of["forgotten"]) for of in forgetting))
    view.add_row("  other tasks", *(spread(of["others"]) for of in forgetting))
    return view


def difference_table(results: Mapping[str, Any], start: Mapping[str, Any]) -> Table:
    view = Table(
        title=f"{start['title']}: differences of normalised scores in points{_over(results)}",
        caption="Paired by seed. In brackets what is not larger than its own deviation.",
    )
    view.add_column("", no_wrap=True)
    pairs = pairs_of(start)
    for one, other in pairs:
        view.add_column(f"{SHORT[one]}\n− {SHORT[other]}".replace("− LoRA ", "− "), justify="right", no_wrap=True)
    for method in _methods(start):
        view.add_row(METHOD_TITLES[method], *(difference(paired(start, *pair, method)) for pair in pairs))
    return view


def pairs_of(start: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Neighbours among the controls there are: where LoRA-FA is layer scope, layer scope takes its place.

    >>> pairs_of({"controls": {"factors": 0, "delta_weight": 0, "layer": 0, "model": 0}})
    [('delta_weight', 'factors'), ('layer', 'delta_weight'), ('model', 'layer')]
    """
    keys = list(start["controls"])
    return [(one, other) for other, one in itertools.pairwise(keys)]


def difference(value: Mapping[str, Any]) -> str:
    """Points with deviation; in brackets where that is as large.

    >>> difference({"mean": 0.02, "std": 0.01}), difference({"mean": 0.02, "std": 0.03})
    ('+2.0 ±1.0', '(+2.0 ±3.0)')
    """
    if value["mean"] is None:
        return "–"
    mean, std = 100 * value["mean"], value["std"]
    if std is None:
        return f"{mean:+.1f}"
    text = f"{mean:+.1f} ±{100 * std:.1f}"
    return text if abs(mean) > 100 * std else f"({text})"


def reading(results: Mapping[str, Any]) -> str:
    """Sentences computed from the numbers."""
    sentences = []
    for start in results["starts"].values():
        controls = start["controls"]
        best = {
            key: max(entry["methods"].items(), key=lambda of: of[1]["normalised"]["mean"] or 0.0)
            for key, entry in controls.items()
        }
        listed = ", ".join(
            f"{SHORT[key]} {spread(found['normalised'])} ({METHOD_TITLES[method]})"
            for key, (method, found) in best.items()
        )
        top = max(
            ((key, method, found["absolute"]["mean"]) for key, (method, found) in _best_absolute(controls).items()),
            key=lambda of: of[2],
        )
        sentences += [
            f"{start['title']}. Best normalised score of each control, in %: {listed}.",
            f"Best absolute score: {percent(top[2])} %, {SHORT[top[0]]} by {METHOD_TITLES[top[1]]}; before fine-tuning "
            f"it is {percent(controls[top[0]]['before']['mean'])} %.",
        ]
    return "\n".join(sentences)


def spread(value: Mapping[str, Any]) -> str:
    """
    >>> spread({"mean": 0.793, "std": 0.006}), spread({"mean": 0.793, "std": None}), spread({"mean": None, "std": None})
    ('79.3 ±0.6', '79.3', '–')
    """
    if value["mean"] is None:
        return "–"
    return percent(value["mean"]) + ("" if value["std"] is None else f" ±{100 * value['std']:.1f}")


def _best_absolute(controls: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    return {
        key: max(entry["methods"].items(), key=lambda of: of[1]["absolute"]["mean"]) for key, entry in controls.items()
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The score tables for a README: absolute / normalised in %."""
    lines = []
    for start in results["starts"].values():
        controls = start["controls"]
        lines += [f"{start['title']}. {start['note']}", "", f"| | {' | '.join(SHORT[key] for key in controls)} |"]
        lines += ["|---" * (1 + len(controls)) + "|"]
        rows = {
            "before fine-tuning": [spread(entry["before"]) for entry in controls.values()],
            "single task": [spread(entry["single"]) for entry in controls.values()],
            **{
                METHOD_TITLES[method]: [
                    f"{spread(of['absolute'])} / {spread(of['normalised'])}"
                    for of in (entry["methods"][method] for entry in controls.values())
                ]
                for method in _methods(start)
            },
            "negation: the task / the others": [
                f"{spread(entry['negation']['forgotten'])} / {spread(entry['negation']['others'])}"
                for entry in controls.values()
            ],
        }
        lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()] + [""]
    return "\n".join(lines)


def _methods(start: Mapping[str, Any]) -> list[str]:
    return list(next(iter(start["controls"].values()))["methods"])


def _over(results: Mapping[str, Any]) -> str:
    return f", mean ± std over {results['seeds']} seeds" if results["seeds"] > 1 else ", one seed"
