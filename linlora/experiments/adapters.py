"""Compares fusion methods on the user's own adapters and tasks: which method, which λ?

Linearized adapters of one starting point are fused there; all others as what they add to the weights, ΔW. Every row of
the table is a job: the backbone, each adapter by itself, each method with options searched on validation.
"""

from __future__ import annotations

import functools
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from linlora import formats
from linlora.experiments.adapters_report import DEFAULT, report_of
from linlora.experiments.controls import Space
from linlora.experiments.fusing import fuse_by
from linlora.experiments.jobs import Job, Workers
from linlora.experiments.judges import Judge, judges, misfit, refuse_other_bases, refuse_untested, suite_of
from linlora.experiments.options import METHOD_TITLES, Options, fusion_method
from linlora.experiments.results import normalised
from linlora.experiments.run import Experiment, Report, run
from linlora.experiments.stamps import stamp, stamps
from linlora.fusion.registry import FROM_VECTORS
from linlora.storage.run_directory import read_json, staged, write_json
from linlora.training.suite import Suite
from linlora.vectors.common_space import in_one_space
from linlora.vectors.task_vector import TaskVector

SCORES_FILE, VECTOR_FILE = "scores.json", "task_vector.safetensors"


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
    found = [local(adapter) for adapter in adapters]
    comparison = AdapterComparison(found, list(map(str, on)), Path(out), options or Options(), base)
    return run(comparison, "linlora compare, adapters", 1, workers, fresh, console)


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


class AdapterComparison(Experiment):
    """The rows of the table. Adapters and model are loaded when a process first asks for them.

    Raises as `compare_adapters`.
    """

    def __init__(
        self, adapters: Sequence[str], on: Sequence[str], out: Path, options: Options, base: str | None = None
    ) -> None:
        self.adapters, self.on, self.out, self.options, self.base = list(adapters), list(on), out, options, base
        self.device = self.judges[0].settings.device
        refuse_untested(judge.settings for judge in self.judges)
        refuse_other_bases(self.judges, self.vectors)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name not in ("judges", "vectors", "suite", "space")
        }

    def fingerprint(self) -> dict[str, Any]:
        """The settings that a run directory is continued with: adapters that changed since are other adapters."""
        tasks = [judge.settings for judge in self.judges]
        return {
            "adapters": self.adapters,
            "files": {path: stamp(_adapter_files(Path(path))) for path in (*self.adapters, *self.on)} | stamps(*tasks),
            "on": self.on,
            "base": self.base,
            "settings": {task.name: task.to_dict() for task in tasks},
            "options": asdict(self.options),
        }

    @functools.cached_property
    def judges(self) -> list[Judge]:
        return judges(self.on or self.adapters)

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
        return suite_of(self.judges, self.vectors, "validation", "test")

    @functools.cached_property
    def space(self) -> Space:
        return Space(self.vectors, self.suite.base, self.suite.model, self.suite.put)

    def methods(self) -> dict[str, str | None]:
        """The methods that are asked for, with the reason why one does not fit."""
        return {method: misfit(method, self.vectors, not self.on) for method in self.options.methods}

    def folder(self, row: str) -> Path:
        return self.out / "rows" / row

    def phases(self, seeds: int) -> list[list[Job]]:
        rows = {"backbone": "scored the backbone"}
        rows |= {f"adapter-{i}": f"scored {name}" for i, name in enumerate(self.adapters, 1)}
        rows |= {m: f"fused by {METHOD_TITLES[m]}" for m, reason in self.methods().items() if reason is None}
        return [
            [
                Job(title, self.folder(row), (SCORES_FILE,), functools.partial(self.score, row))
                for row, title in rows.items()
            ]
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

    def results(self, seeds: int) -> dict[str, Any]:
        """The rows, the best single adapter of each task, and the recommendation."""
        (jobs,) = self.phases(seeds)
        rows = {job.folder.name: read_json(job.folder / SCORES_FILE) for job in jobs}
        singles = [rows[f"adapter-{i}"] for i in range(1, 1 + len(self.adapters))]
        tasks = list(self.suite.tasks)
        own = not self.on and len(tasks) == len(singles)
        best = [i if own else _best([single["chosen_by"][i] for single in singles]) for i in range(len(tasks))]
        single = [singles[b]["test"][i] for i, b in enumerate(best)]
        for row in rows.values():
            row["normalised"] = normalised(row["test"], single)
        counts = [len(task.rows("validation")) for task in self.suite.tasks.values()]
        return {
            **self.fingerprint(),
            "scope": self.vectors[0].scope,
            "tasks": tasks,
            "single": {"of_task": [self.adapters[b] for b in best], "own": own, "test": single},
            "rows": rows,
            "left_out": {method: reason for method, reason in self.methods().items() if reason},
            "recommendation": self._recommended(rows, counts),
        }

    def report(self, results: dict[str, Any]) -> Report:
        return report_of(results, self.out)

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
        chosen = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        way = [*scope, "--method", fusion_method(method), "--out", "fused.safetensors"]
        return shlex.join(["linlora", "fuse", *self.adapters, *way, *chosen])


def _adapter_files(path: Path) -> set[Path]:
    """The files of an adapter, without what was written beside them since; of a recipe the file itself."""
    return {path} if path.is_file() else {*path.glob("*adapter*"), *path.glob("*.safetensors")}


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i])
