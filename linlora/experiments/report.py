"""The report: a table for each start, the differences of the controls, and what the numbers say, good or bad."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from linlora.experiments.controls import SHORT
from linlora.experiments.figures import draw_all
from linlora.experiments.options import METHOD_TITLES
from linlora.experiments.results import paired
from linlora.experiments.run import Report
from linlora.training.report import percent

_OUTPUTS = {
    "results.json": "every number, by control, method, seed and task, with options, settings and environment",
    "table.txt": "the tables and their reading; table.md the same for a README",
    "scalings.png": "score against the scaling coefficient λ, with the untrained backbone",
    "scores.png": "normalised scores of every method and control",
    "cosines.png": "cosines between what is added",
    "disentanglement.png": "how often two fused tasks answer otherwise than alone",
    "adapters/": "every task vector, with its adapter for stock PEFT (but for model scope, which has none)",
    "fused/": "the scores of every fusion, and fused vectors",
}


def report_of(results: Mapping[str, Any], out: Path) -> Report:
    """Draw the pictures of a finished run; its tables and their reading."""
    draw_all(results, out)
    return Report(tables(results), reading(results), _OUTPUTS, markdown(results))


def tables(results: Mapping[str, Any]) -> list[Table]:
    """For each start the scores in %, and where controls are many the paired differences of the normalised ones."""
    return [make(results, start) for start in results["starts"].values() for make in (score_table, difference_table)]


def score_table(results: Mapping[str, Any], start: Mapping[str, Any]) -> Table:
    controls = start["controls"]
    title = f"{start['title']}: test score in %, mean of {len(results['tasks'])} tasks{_over(results)}"
    view = Table(title=title, caption=_caption(results, start))
    view.add_column("", no_wrap=True)
    for key in controls:
        view.add_column(SHORT[key].replace(" ", "\n"), justify="right", no_wrap=True)
    for row, cells in _rows(results, start):
        for title, part in zip((row, "  normalised"), zip(*cells, strict=True), strict=False):
            view.add_row(title, *part)
    return view


def markdown(results: Mapping[str, Any]) -> str:
    """The score tables for a README: absolute / normalised in %."""
    lines = []
    for start in results["starts"].values():
        controls = start["controls"]
        lines += [f"{start['title']}. {start['note']}", "", f"| | {' | '.join(SHORT[key] for key in controls)} |"]
        lines += ["|---" * (1 + len(controls)) + "|"]
        lines += [
            f"| {title} | {' | '.join(' / '.join(cell) for cell in cells)} |" for title, cells in _rows(results, start)
        ]
        lines += [""]
    return "\n".join(lines)


def _rows(results: Mapping[str, Any], start: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """The rows of a score table: a title, and of each control one number, or two that belong together."""
    controls = start["controls"]
    entries = list(controls.values())
    yield "before fine-tuning", [(spread(entry["before"]),) for entry in entries]
    yield "single task", [(spread(entry["single"]),) for entry in entries]
    for method in methods_of(start):
        found = [entry["methods"].get(method) for entry in entries]
        yield (
            METHOD_TITLES[method],
            [(spread(of["absolute"]), spread(of["normalised"])) if of else ("–", "–") for of in found],
        )
        if method == "task_arithmetic":
            yield "λ of each seed", [(_chosen(of),) for of in found]
    if all(entry["negation"] for entry in entries):
        negations = [entry["negation"] for entry in entries]
        yield "negation: the task", [(spread(of["forgotten"]),) for of in negations]
        yield "negation: the others", [(spread(of["others"]),) for of in negations]
    if times := results.get("step_time"):
        ms = times["median_ms"]
        plain = {"factors": "lora", "delta_weight": "lora", "layer": "layer", "model": "model"}
        mine = [ms.get(plain.get(key, "")) for key in controls]
        theirs = [ms.get(f"{plain.get(key, '')}_torch_func") for key in controls]
        yield "training step in ms", [(_ms(time),) for time in mine]
        yield "  by torch.func", [(_ms(time),) for time in theirs]


def _ms(time: float | None) -> str:
    return "–" if time is None else f"{time:.1f}"


def _chosen(found: Mapping[str, Any]) -> str:
    return " ".join(f"{options['scaling']:g}" for options in found["options_by_seed"])


def _caption(results: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    lines = [start["note"], "Normalised: over the single-task adapters."]
    if times := results.get("step_time"):
        differences = " and ".join(f"{d:.0e} ({scope} scope)" for scope, d in times["max_loss_difference"].items())
        lines.append(
            f"torch.func: the same training without linlora; in {times['steps']} steps the losses differ by at most "
            f"{differences}."
        )
    return "\n".join(lines)


def difference_table(results: Mapping[str, Any], start: Mapping[str, Any]) -> Table:
    view = Table(
        title=f"{start['title']}: differences of normalised scores in points{_over(results)}",
        caption="Paired by seed. In brackets what is not larger than its own deviation.",
    )
    view.add_column("", no_wrap=True)
    pairs = pairs_of(start)
    for one, other in pairs:
        view.add_column(f"{SHORT[one]}\n− {SHORT[other]}".replace("− LoRA ", "− "), justify="right", no_wrap=True)
    for method in methods_of(start):
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
    return "\n".join(line for start in results["starts"].values() for line in _reading(results, start))


def _reading(results: Mapping[str, Any], start: Mapping[str, Any]) -> Iterator[str]:
    controls = start["controls"]
    before = next(iter(controls.values()))["before"]["mean"]
    best = {
        key: max(entry["methods"].items(), key=lambda of: _or_less_than_any(of[1]["normalised"]["mean"]))
        for key, entry in controls.items()
    }
    kept = (f"{SHORT[k]} {spread(of['normalised'])} ({METHOD_TITLES[method]})" for k, (method, of) in best.items())
    yield (
        f"{start['title']}. With options chosen on validation, the best method of each column keeps, in % of the "
        f"single-task scores: {', '.join(kept)}."
    )
    sums = {key: entry["methods"]["sum"]["normalised"] for key, entry in controls.items() if "sum" in entry["methods"]}
    if sums and all(of["mean"] is not None for of in sums.values()):
        most, least = (chooses(sums, key=lambda key: sums[key]["mean"]) for chooses in (max, min))
        yield (
            f"Added as they are (λ = 1), {SHORT[most]} keeps most, {spread(sums[most])} %, and {SHORT[least]} least, "
            f"{spread(sums[least])} %."
        )
    absolute = {
        key: max(entry["methods"].items(), key=lambda of: of[1]["absolute"]["mean"]) for key, entry in controls.items()
    }
    key, (method, of) = max(absolute.items(), key=lambda found: found[1][1]["absolute"]["mean"])
    score = of["absolute"]["mean"]
    yield (
        f"Best absolute score: {percent(score)} %, {SHORT[key]} by {METHOD_TITLES[method]}; before fine-tuning it is "
        f"{percent(before)} %."
    )
    if times := results.get("step_time"):
        ms = times["median_ms"]
        steps = (
            f"{ms[scope] / ms['lora']:.2f} at {scope} scope (torch.func: {ms[f'{scope}_torch_func'] / ms['lora']:.2f})"
            for scope in ("layer", "model")
        )
        yield f"In steps of LoRA, a linearized training step takes {' and '.join(steps)}."


def _or_less_than_any(score: float | None) -> float:
    return -math.inf if score is None else score


def compare(one: str, other: str, value: Mapping[str, Any]) -> str:
    """A sentence for a paired difference of fractions. One that is smaller than its own deviation is not called one.

    >>> compare("MHR", "LoRA", {"mean": 0.012, "std": 0.003})
    'MHR is better than LoRA by 1.2 ± 0.3 points'
    """
    mean, std = value["mean"], value["std"]
    verdict = f"{one} is {'better' if mean > 0 else 'worse'} than {other} by {100 * abs(mean):.1f}"
    if std is None:
        return f"{verdict} points (one seed)" if mean else f"{one} and {other} are equal (one seed)"
    if abs(mean) <= std:
        return f"{one} and {other} do not clearly differ ({100 * mean:+.1f} ± {100 * std:.1f} points)"
    return f"{verdict} ± {100 * std:.1f} points"


def spread(value: Mapping[str, Any]) -> str:
    """
    >>> spread({"mean": 0.793, "std": 0.006}), spread({"mean": 0.793, "std": None}), spread({"mean": None, "std": None})
    ('79.3 ±0.6', '79.3', '–')
    """
    if value["mean"] is None:
        return "–"
    return percent(value["mean"]) + ("" if value["std"] is None else f" ±{100 * value['std']:.1f}")


def methods_of(start: Mapping[str, Any]) -> list[str]:
    """The methods that any control has, in their order."""
    known = {method for entry in start["controls"].values() for method in entry["methods"]}
    return [method for method in METHOD_TITLES if method in known]


def _over(results: Mapping[str, Any]) -> str:
    return f", mean ± std over {results['seeds']} seeds" if results["seeds"] > 1 else ", one seed"
