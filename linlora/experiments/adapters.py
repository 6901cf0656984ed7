"""Compares fusion methods on the user's own adapters and tasks: which method, which λ?

Linearized adapters of one starting point are fused there; all others as what they add to the weights, ΔW. Every row of
the table is a job: the backbone, each adapter by itself, each method with options searched on validation.
"""

from __future__ import annotations

import functools
import math
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from linlora import formats
from linlora.experiments.controls import Space
from linlora.experiments.environment import surroundings
from linlora.experiments.figures import draw_search
from linlora.experiments.fusing import fuse_by
from linlora.experiments.jobs import Job, Workers, run_jobs
from linlora.experiments.judges import judges, misfit, refuse_other_bases, refuse_untested, suite_of
from linlora.experiments.options import METHOD_TITLES, Options, fusion_method, in_words
from linlora.experiments.report import percent, print_outputs, write_tables
from linlora.experiments.results import normalised
from linlora.experiments.run import opened
from linlora.fusion.registry import FROM_VECTORS
from linlora.storage.environment import environment
from linlora.storage.run_directory import read_json, staged, write_json
from linlora.training.suite import Suite
from linlora.vectors.common_space import in_one_space
from linlora.vectors.task_vector import TaskVector

SCORES_FILE, VECTOR_FILE = "scores.json", "task_vector.safetensors"
DEFAULT = "task_arithmetic"
CAVEAT = (
    "Published comparisons of these methods disagree, and on large language models only task arithmetic gains "
    "reliably: it is recommended unless another method is ahead of it here by more than one standard error."
)
_OUTPUTS = {
    "results.json": "every number, by task, with the options that were tried",
    "table.txt": "the table and the recommendation; table.md the same for a README",
    "scalings.png": "validation score against the scaling coefficient λ",
    "rows/": "the scores of every row, and the fused vectors",
}


def compare_adapters(
    adapters: Sequence[str],
    on: Sequence[str | Path] = (),
    out: str | Path = "runs/compare",
    fresh: bool = False,
    options: Options | None = None,
    console: Console | None = None,
    workers: Workers = 1,
    base: str | None = None,
) -> dict[str, Any]:
    """Fuse adapters by every method that fits; print the table, a picture, and the command that makes the best.

    A call with the same `out` and arguments continues where an interrupted one was.

    Args:
        adapters: folders of runs, task vectors, PEFT adapters, mixed; or ids of the Hugging Face hub. Two or more.
        on: recipes, or folders of runs, whose data sets score; those of the adapters if left out.
        options: what is tried; `Options(methods=...)` for some methods.
        base: the base model of all adapters, where they name it differently.

    Returns: what `results.json` holds.

    Raises ValueError for adapters that do not add, fewer than two, or a task without a test split; what
    `linlora.formats.read` does.
    """
    if len(adapters) < 2:
        raise ValueError(f"a comparison fuses two adapters or more, got {len(adapters)}")
    out, options, console = Path(out), options or Options(), console or Console()
    comparison = AdapterComparison([local(adapter) for adapter in adapters], list(map(str, on)), out, options, base)
    comparison.check()
    begin = time.perf_counter()
    with opened(out, comparison.fingerprint(), "linlora compare, adapters", 1, workers, fresh):
        done = run_jobs([comparison.jobs()], workers, surroundings, console)
        results = comparison.results()
        results |= {"jobs": asdict(done), "wall_seconds": time.perf_counter() - begin}
        _write(results, out, console)
    return results


def local(adapter: str) -> str:
    """The folder or file of an adapter; an id of the hub is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(adapter).exists():
        return adapter
    if adapter.count("/") != 1 or adapter.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{adapter}: no such file or folder, and no name of the Hugging Face hub, OWNER/NAME")
    try:
        return snapshot_download(adapter, allow_patterns=["*.safetensors", "*.json"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{adapter}: no such file or folder, and not found on the hub: {reason}") from error


class AdapterComparison:
    """The jobs of one run directory. Adapters and model are loaded when a process first asks for them."""

    def __init__(
        self, adapters: Sequence[str], on: Sequence[str], out: Path, options: Options, base: str | None = None
    ) -> None:
        self.adapters, self.on, self.out, self.options, self.base = list(adapters), list(on), out, options, base

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("vectors", "suite", "space")}

    def fingerprint(self) -> dict[str, Any]:
        """The settings that a run directory is continued with: adapters that changed since are other adapters."""
        tasks = {judge.settings.name: judge.settings.to_dict() for judge in judges(self.on or self.adapters)}
        files = {adapter: _stamps(Path(adapter)) for adapter in self.adapters}
        return {
            "adapters": self.adapters,
            "files": files,
            "on": self.on,
            "base": self.base,
            "settings": tasks,
            "options": asdict(self.options),
        }

    @functools.cached_property
    def vectors(self) -> list[TaskVector]:
        """In the space they are fused in."""
        read = [formats.read(adapter) for adapter in self.adapters]
        linearized = {vector.scope for vector in read} <= {"layer", "model"}
        at_one_point = linearized and len({vector.point_hash for vector in read}) == 1
        return in_one_space(read, self.adapters, None if at_one_point else "weight", self.base)[0]

    @property
    def in_weights(self) -> bool:
        return self.vectors[0].scope == "weight"

    @functools.cached_property
    def suite(self) -> Suite:
        return suite_of(judges(self.on or self.adapters), self.vectors, "validation", "test")

    @functools.cached_property
    def space(self) -> Space:
        return Space(self.vectors, self.suite.base, self.suite.model, self.suite.put)

    def check(self) -> None:
        tasks = judges(self.on or self.adapters)
        refuse_untested(judge.settings for judge in tasks)
        refuse_other_bases(tasks, self.vectors)
        self.methods()

    def methods(self) -> dict[str, str | None]:
        """The methods that are asked for, with the reason why one does not fit."""
        return {method: misfit(method, self.vectors, not self.on) for method in self.options.methods}

    def folder(self, row: str) -> Path:
        return self.out / "rows" / row

    def jobs(self) -> list[Job]:
        rows = {"backbone": "scored the backbone"}
        rows |= {f"adapter-{i}": f"scored {name}" for i, name in enumerate(self.adapters, 1)}
        rows |= {m: f"fused by {METHOD_TITLES[m]}" for m, reason in self.methods().items() if reason is None}
        return [
            Job(title, self.folder(row), (SCORES_FILE,), functools.partial(self.score, row))
            for row, title in rows.items()
        ]

    def score(self, row: str) -> None:
        """Write the scores of a row, and of a method the fused vector."""
        tasks, at = self.suite, self.space
        with staged(self.folder(row)) as staging:
            if row in METHOD_TITLES:
                scores, vector = fuse_by(row, at, tasks, self.options, seed=0)
                at.put(vector)
                vector.save(staging / VECTOR_FILE)
            else:
                scores = {"options": {}, "validation": []}
                at.put(0.0 * at.vectors[0] if row == "backbone" else at.vectors[int(row.rpartition("-")[2]) - 1])
                scores["test"] = tasks.scores(at.model, "test")
            scores["chosen_by"] = tasks.scores(at.model, "validation")
            write_json(staging / SCORES_FILE, scores)

    def results(self) -> dict[str, Any]:
        """The rows, the best single adapter of each task, and the recommendation."""
        rows = {job.folder.name: read_json(job.folder / SCORES_FILE) for job in self.jobs()}
        singles = [rows[f"adapter-{i}"] for i in range(1, 1 + len(self.adapters))]
        tasks = list(self.suite.tasks)
        own = not self.on and len(tasks) == len(singles)
        best = [i if own else _best([single["chosen_by"][i] for single in singles]) for i in range(len(tasks))]
        single = [singles[b]["test"][i] for i, b in enumerate(best)]
        for row in rows.values():
            row["normalised"] = normalised(row["test"], single)
        counts = [len(task.rows("validation")) for task in self.suite.tasks.values()]
        return {
            "environment": environment(self.suite.device),
            **self.fingerprint(),
            "scope": self.vectors[0].scope,
            "tasks": tasks,
            "single": {"of_task": [self.adapters[b] for b in best], "own": own, "test": single},
            "rows": rows,
            "left_out": {method: reason for method, reason in self.methods().items() if reason},
            "recommendation": self._recommended(rows, counts),
        }

    def _recommended(self, rows: Mapping[str, Any], counts: Sequence[int]) -> dict[str, Any]:
        """The method with the best validation score; task arithmetic where that is not clearly worse."""
        found = {method: statistics.fmean(rows[method]["chosen_by"]) for method in rows if method in METHOD_TITLES}
        method = max(found, key=lambda name: found[name])
        errors = [max(0.0, s * (1 - s)) / n for s, n in zip(rows[method]["chosen_by"], counts, strict=True)]
        error = math.sqrt(2 * sum(errors)) / len(counts)
        if DEFAULT in found and found[method] - found[DEFAULT] <= error:
            method = DEFAULT
        return {"method": method, "standard_error": error, "command": self._command(method, rows[method]["options"])}

    def _command(self, method: str, options: Mapping[str, Any]) -> str:
        """The command that makes the fused vector: from the files, or the vector that is here where data is needed."""
        here = str(self.folder(method) / VECTOR_FILE)
        if fusion_method(method) not in FROM_VECTORS:
            exported = ["export", here, "--out", "fused-adapter"]
            return shlex.join(["linlora", *(["inspect", here] if self.vectors[0].scope == "model" else exported)])
        scope = [*(["--scope", "weight"] if self.in_weights else []), *(["--base", self.base] if self.base else [])]
        chosen = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", f"{value:g}")]
        way = [*scope, "--method", fusion_method(method), "--out", "fused.safetensors"]
        return shlex.join(["linlora", "fuse", *self.adapters, *way, *chosen])


def _stamps(adapter: Path) -> dict[str, list[int]]:
    """Size and time of change of an adapter's files."""
    files = (
        [adapter] if adapter.is_file() else sorted(adapter.glob("*adapter*")) + sorted(adapter.glob("*.safetensors"))
    )
    return {file.name: [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in files if file.is_file()}


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i])


def table(results: Mapping[str, Any]) -> Table:
    """A row for the backbone, each adapter, and each method: scores of the test splits in %."""
    tasks, rows = results["tasks"], results["rows"]
    title, below = "Test score in %; options chosen on validation", _caption(results)
    view = Table(title=title, title_justify="left", caption=below, caption_justify="left")
    view.add_column("", overflow="fold")
    for heading in (*(tasks if len(tasks) <= 6 else ()), "mean", "normalised"):
        view.add_column(heading, justify="right", overflow="fold")
    view.add_column("options", overflow="fold")
    for title, cells in _rows(results):
        if title == METHOD_TITLES[next((m for m in METHOD_TITLES if m in rows), DEFAULT)]:
            view.add_section()
        view.add_row(title, *(cells if len(tasks) <= 6 else cells[len(tasks) :]))
    return view


def _rows(results: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    found = []
    titles = {"backbone": "backbone, no adapter"}
    titles |= {f"adapter-{i}": Path(name).name for i, name in enumerate(results["adapters"], 1)}
    for key, row in results["rows"].items():
        scores = [percent(score) for score in (*row["test"], statistics.fmean(row["test"]), row["normalised"])]
        options = in_words(row["options"])
        found.append((titles.get(key) or METHOD_TITLES[key], [*scores, options]))
    single = results["single"]["test"]
    whose = "own adapter of each task" if results["single"]["own"] else "best adapter of each task"
    cells = [*(percent(score) for score in (*single, statistics.fmean(single), 1.0)), ""]
    return [*found[: 1 + len(results["adapters"])], (whose, cells), *found[1 + len(results["adapters"]) :]]


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
            f"{percent(mean['backbone'])} % on test{beside}, one adapter for each task {percent(single)}.\n{CAVEAT}"
        )
    return (
        f"Recommended: {METHOD_TITLES[chosen['method']]}{f' ({options})' if options else ''}. It scores "
        f"{percent(mean[chosen['method']])} % on test; the backbone {percent(mean['backbone'])}{beside}, one adapter "
        f"for each task {percent(single)}.\n{CAVEAT}\n  {chosen['command']}"
    )


def _write(results: Mapping[str, Any], out: Path, console: Console) -> None:
    headings = ["", *results["tasks"], "mean", "normalised", "options"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    lines += [f"| {' | '.join([title, *cells])} |" for title, cells in _rows(results)]
    searches = {METHOD_TITLES[row]: of["validation"] for row, of in results["rows"].items() if row in METHOD_TITLES}
    before = statistics.fmean(results["rows"]["backbone"]["chosen_by"])
    of_tasks = f"Fused adapters, scaled by λ, mean of {len(results['tasks'])} tasks"
    draw_search(searches, {"backbone, no adapter": before}, of_tasks, out / "scalings.png")
    words = reading(results)
    write_tables(results, out, console, [table(results)], words, "\n".join([*lines, "", words, ""]))
    print_outputs(results["wall_seconds"], out, _OUTPUTS, console)
