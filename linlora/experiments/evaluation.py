"""Scores of vectors on data sets, alone or fused into one, and their tables: what `linlora eval` does."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from linlora.experiments.controls import Space
from linlora.experiments.fusing import best_options, builder
from linlora.experiments.judges import Judge, misfit, refuse_untested, suite_of
from linlora.experiments.options import Options, in_words
from linlora.experiments.results import mean_if_all, ratio
from linlora.fusion import METHODS, fuse, needs
from linlora.fusion.checks import check_options, required
from linlora.training.folder import Run
from linlora.training.report import percent
from linlora.training.suite import Suite
from linlora.vectors.task_vector import TaskVector


def evaluate_vector(vector: TaskVector, tasks: Sequence[Judge], split: str) -> dict[str, Any]:
    """The scores of one vector on a split of some tasks, and in "references" of the backbone without it."""
    suite = suite_of(tasks, [vector], split)
    return _result(suite, vector, split, {"backbone": 0.0 * vector}, [split])


def evaluate_alone(tasks: Sequence[Judge], split: str) -> dict[str, Any]:
    """The scores of runs, each by its own task. Their models need have nothing in common."""
    found = {str(judge.run.folder): _of_run(judge.run, judge, split) for judge in tasks if judge.run is not None}
    tasks_of = {folder: of_task for folder, result in found.items() for of_task in result["tasks"].values()}
    mean = {"score": statistics.fmean(of_task["score"] for of_task in tasks_of.values())}
    return {**next(iter(found.values())), "tasks": tasks_of, "mean": mean}


def evaluate_fused(
    vectors: Sequence[TaskVector],
    tasks: Sequence[Judge],
    split: str,
    method: str,
    options: Mapping[str, Any],
    searched: bool = False,
    own_tasks: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """The scores of fused vectors on a split of some tasks, beside those of the single runs.

    Args:
        vectors: of one space (`linlora.vectors.common_space`).
        options: of the method. With `searched` they are searched on the validation split, among the values of
            `Options`, or of a list where an option is one; the test split has no say.
        own_tasks: the vectors are the runs of the tasks, in their order.
        console: where the search is followed.

    Returns: what `evaluate_vector` does, with "single" and "normalised" scores; the "references", by split what the
        backbone without a vector and the average score; and the "search", every point with its validation scores.

    Methods that learn from data see the validation rows that `linlora compare` shows them (`fusing.data_for`).
    """
    if method not in METHODS:
        raise ValueError(f"unknown method '{method}'; choose one of {', '.join(METHODS)}")
    check_options(method, METHODS[method], {**options, **dict.fromkeys(required(METHODS[method]))})
    if reason := misfit(method, vectors, own_tasks):
        raise ValueError(f"{method} {reason}")
    if searched and split == "test":
        refuse_untested(judge.settings for judge in tasks)
    choices = Options().choices(method, {k: v if isinstance(v, list) else [v] for k, v in options.items()})
    if searched and len(choices) < 2:
        raise ValueError(f"search: {method} has no option with several values to try; give one a list of them")
    splits = list(dict.fromkeys([split, *(["validation"] if searched else [])]))
    learnt = ["validation"] if needs(method) == "examples" else []
    suite = suite_of(tasks, vectors, *splits, *learnt)
    at = Space(vectors, suite.base, suite.model, suite.put)
    build = builder(method, at, suite, Options(), progress=True)
    chosen, curve = best_options(build, at, suite, choices, console) if searched else (dict(options), None)
    references = {"backbone": 0.0 * vectors[0], "average": fuse(list(vectors), "average")}
    result = _result(suite, build(**chosen), split, references, splits)
    single = {judge.settings.name: _single(judge, split) for judge in tasks}
    return {**_normalised(result, single), "method": method, "options": chosen, "search": curve}


def _result(
    suite: Suite, vector: TaskVector, split: str, references: Mapping[str, TaskVector], splits: Sequence[str] = ()
) -> dict[str, Any]:
    """The scores of a vector on a split, and those of others on some splits."""
    suite.put(vector)
    scores = suite.evaluate(suite.model, split, progress=True)
    found: dict[str, Any] = {
        "split": split, "method": None, "options": {}, "search": None,
        "tasks": {name: {"metric": suite.tasks[name].metric, **of_task} for name, of_task in scores.items()},
        "mean": {"score": statistics.fmean(of_task["score"] for of_task in scores.values())},
    }  # fmt: skip
    for name, reference in references.items():
        suite.put(reference)
        found.setdefault("references", {})[name] = {of: suite.scores(suite.model, of) for of in splits}
    return found


def _of_run(run: Run, judge: Judge, split: str) -> dict[str, Any]:
    return _result(suite_of([judge], [run.vector], split), run.vector, split, {})


def _single(judge: Judge, split: str) -> float | None:
    """The score of a task's run by itself."""
    if judge.run is None:
        return None
    if split in judge.run.metrics:
        return float(judge.run.metrics[split]["score"])
    return _of_run(judge.run, judge, split)["mean"]["score"]


def _normalised(result: dict[str, Any], single: Mapping[str, float | None]) -> dict[str, Any]:
    """The result with each run's own score and fused / single; None where there is no run, or none above 0."""
    tasks, ratios = {}, []
    for name, of_task in result["tasks"].items():
        alone = single[name]
        ratios.append(ratio(of_task["score"], alone))
        tasks[name] = {**of_task, "single": alone, "normalised": ratios[-1]}
    mean = {**result["mean"], "single": mean_if_all(single.values()), "normalised": mean_if_all(ratios)}
    return {**result, "tasks": tasks, "mean": mean}


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
    if len({statistics.fmean(point["scores"]) for point in result["search"]}) == 1:
        names = {name for point in result["search"] for name in point["options"]}
        which = "λ" if names == {"scaling"} else "choice of the options"
        view.caption, view.caption_justify = f"note: every {which} scores the same: the search says nothing", "left"
    return view


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """The picture of a search, a line for each choice of the options beside the scaling; False without a curve."""
    from linlora.experiments.figures import draw_search

    searches: dict[str, list[Any]] = {}
    for point in result["search"]:
        others = {name: value for name, value in point["options"].items() if name != "scaling"}
        searches.setdefault(in_words(others) or result["method"], []).append(point)
    references = {name: statistics.fmean(of["validation"]) for name, of in result["references"].items()}
    return draw_search(searches, references, f"{result['method']} of {len(result['vectors'])} vectors", path)


def _title(result: Mapping[str, Any]) -> str:
    if result["method"] is None:
        return f"{result['split']} split"
    options = in_words(result["options"])
    chosen = ", chosen on these rows" if result["search"] and result["split"] == "validation" else ""
    return f"{result['split']} split, fused by {result['method']}" + (f" ({options}{chosen})" if options else "")
