"""The comparison on the tasks of a recipe: any model and data sets that `linlora train` takes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from linlora.comparison.controls import CONTROLS, Control, Trained
from linlora.comparison.fuse import fuse_control, map_control
from linlora.comparison.results import control_results
from linlora.comparison.settings import START_NOTES, START_TITLES, Options
from linlora.comparison.write import write_report
from linlora.quickstart.results import environment
from linlora.storage.run_directory import is_whole, only_run_in, open_run_directory, read_json, staged, write_json
from linlora.training import Run, Task, evaluate, load_task, recipe, set_head, train
from linlora.training import Settings as TaskSettings
from linlora.training.adapted import read_point
from linlora.training.evaluation import arithmetic, on_device
from linlora.training.suite import Batches
from linlora.vectors.products import evaluating

_UNLABELED_ROWS = 256  # of each task: what AdaMerging goes through again and again, and the maps are drawn of


def compare_recipe(
    path: str | Path,
    out: str | Path = "runs/compare",
    seeds: int = 3,
    fresh: bool = False,
    options: Options | None = None,
    learning_rates: Mapping[str, float] | None = None,
    overrides: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compare every control by every fusion method on the tasks of a recipe; print and draw the report.

    Every task is trained by LoRA, at layer and at model scope, and with A frozen where the recipe's point has B0 != 0
    (at B0 = 0 that is layer scope), in folders as `linlora train` fills them, `out/adapters/<method>/<task>/seed<n>`. A
    call with the same `out` continues where an interrupted one was.

    Args:
        path: the YAML file; at least two tasks that share one model. A `method` in it has no say here.
        seeds: as many from the recipe's seed on.
        learning_rates: by method ("lora", "lora-fa", "layer", "model") where it is not the recipe's.
        overrides: settings that go before those of the file.

    Raises what `linlora.training.train` does; ValueError for tasks that do not share one model, fewer than two of them,
    or in a process group.
    """
    out, options, console = Path(out), options or Options(), console or Console()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("compare runs in one process; train the tasks with torchrun and linlora train, then fuse them")
    tasks = recipe(path, (), overrides)
    _check(tasks, seeds, learning_rates or {})
    fingerprint = {
        "tasks": {name: {**settings.to_dict(), "out": "", "method": ""} for name, settings in tasks.items()},
        "options": asdict(options),
        "learning_rates": dict(learning_rates or {}),
    }
    open_run_directory(out, fingerprint, fresh, "linlora compare")
    begin = time.perf_counter()
    with only_run_in(out):
        comparison = _Comparison(tasks, out, options, dict(learning_rates or {}), console)
        start = "warm" if comparison.starts_warm else "zero"
        note = START_NOTES["zero"] if start == "zero" else "The adapters start from the recipe's point."
        results = {
            "environment": environment(str(comparison.device)),
            "settings": fingerprint,
            "seeds": seeds,
            "tasks": list(tasks),
            "starts": {start: {"title": START_TITLES[start], "note": note, "controls": comparison.run(seeds)}},
            "wall_seconds": time.perf_counter() - begin,
            "processes": 1,
        }
        write_report(results, out, console)
    return results


class RecipeTasks:
    """`linlora.comparison.tasks.Tasks` of a recipe, with the heads that one kind of training and seed left."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        heads: Mapping[str, Mapping[str, Tensor] | None],
        trained_modules: Sequence[str],
        options: Options,
    ) -> None:
        self.tasks, self.heads, self.options = dict(tasks), dict(heads), options
        self.trained_modules = tuple(trained_modules)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tasks)

    def scores(self, model: nn.Module, split: str) -> list[float]:
        return [evaluate(model, self._enter(model, n), split, progress=False)["score"] for n in self.names]

    def loss(self, model: nn.Module) -> float:
        losses = []
        for name in self.names:
            task = self._enter(model, name)
            rows = task.rows("validation")
            few = [rows[i] for i in range(min(self.options.lorahub_examples, len(rows)))]
            device = next(model.parameters()).device
            with evaluating(model), torch.no_grad(), arithmetic(task, device):
                losses.append(float(_loss(model, task, few, device)))
        return statistics.fmean(losses)

    def unlabeled(self, size: int) -> Sequence[Iterable[Any]]:
        return [Batches(name, task, "validation", size, _UNLABELED_ROWS) for name, task in self.tasks.items()]

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        task, device = self._enter(model, batch["task"]), next(model.parameters()).device
        with arithmetic(task, device):
            return task.logits(model, on_device(batch["inputs"], device))

    def _enter(self, model: nn.Module, name: str) -> Task:
        """Put the head of a task into a model."""
        if (head := self.heads[name]) is not None:
            if isinstance(model, PeftModel):
                set_head(model, head)
            else:
                for parameter, value in head.items():
                    old = model.get_parameter(parameter)
                    old.data = value.to(old.device, old.dtype)
        return self.tasks[name]


def _loss(model: nn.Module, task: Task, rows: Sequence[Any], device: torch.device) -> Tensor:
    """The mean loss on some rows. Of a classifier by its logits: the model itself knows the classes of one task."""
    if task.settings.kind == "text-to-text" or task.answer != "classes":
        return task.batch_loss(model, on_device(task.batch(rows), device))
    expected = torch.tensor([task.expected(row) for row in rows], device=device)
    return cross_entropy(task.logits(model, on_device(task.inputs(rows), device)).float(), expected)


class _Comparison:
    """The jobs of one run directory, done or found."""

    def __init__(
        self, tasks: Mapping[str, TaskSettings], out: Path, options: Options, rates: dict[str, float], console: Console
    ) -> None:
        self.settings, self.out, self.options, self.rates, self.console = dict(tasks), out, options, rates, console
        self.tasks = {name: load_task(settings) for name, settings in tasks.items()}
        first = next(iter(tasks.values()))
        gpu = torch.cuda.is_available() and not first.training.get("use_cpu")
        self.device = torch.device("cuda" if gpu else "cpu")

    @property
    def starts_warm(self) -> bool:
        point = read_point(next(iter(self.settings.values())))
        return point is not None and any(B0.any() for n, B0 in (point.point or {}).items() if n.endswith(".B0"))

    def run(self, seeds: int) -> dict[str, Any]:
        """The results of every control."""
        controls = [control for control in CONTROLS if self.starts_warm or control.key != "lora_fa"]
        runs = {
            (method, seed): self.train(method, seed)
            for seed in range(seeds)
            for method in dict.fromkeys(control.trained for control in controls)
        }
        found = {}
        for control in controls:
            of_control = [runs[control.trained, seed] for seed in range(seeds)]
            scores = [self.fuse(control, seed, of_seed) for seed, of_seed in enumerate(of_control)]
            single = [[float(run.metrics["test"]["score"]) for run in of_seed] for of_seed in of_control]
            found[control.key] = {**control_results(single, scores), "map": self.map(control, of_control[0])}
        return found

    def train(self, method: Trained, seed: int) -> list[Run]:
        return [train(self._settings(name, method, seed), console=self.console) for name in self.settings]

    def fuse(self, control: Control, seed: int, runs: Sequence[Run]) -> dict[str, Any]:
        directory = self.out / "fused" / control.key / f"seed{seed}"
        if not is_whole(directory, "scores.json"):
            self.console.print(f"fusing {control.title}, seed {seed}", highlight=False)
            base, vectors = self._base(), [run.vector for run in runs]
            scores = fuse_control(control, base, vectors, self._tasks(base, runs), self.options, seed)
            with staged(directory) as staging:
                write_json(staging / "scores.json", scores)
        return read_json(directory / "scores.json")

    def map(self, control: Control, runs: Sequence[Run]) -> dict[str, Any]:
        directory = self.out / "maps" / control.key
        if not is_whole(directory, "map.json"):
            self.console.print(f"mapping {control.title}", highlight=False)
            base, vectors = self._base(), [run.vector for run in runs]
            found = map_control(control, base, vectors, self._tasks(base, runs), self.options)
            with staged(directory) as staging:
                write_json(staging / "map.json", found)
        return read_json(directory / "map.json")

    def _settings(self, name: str, method: Trained, seed: int) -> TaskSettings:
        settings = self.settings[name]
        out = str(self.out / "adapters" / method / name / f"seed{seed}")
        training = {"learning_rate": self.rates[method]} if method in self.rates else {}
        return settings.changed(method=method, seed=settings.seed + seed, out=out, training=training)

    def _base(self) -> nn.Module:
        return next(iter(self.tasks.values())).base_model().to(self.device).requires_grad_(False)

    def _tasks(self, base: nn.Module, runs: Sequence[Run]) -> RecipeTasks:
        heads = {name: run.head for name, run in zip(self.tasks, runs, strict=True)}
        first = next(iter(self.tasks.values()))
        trained = first.head_modules(base) if first.settings.head == "trained" else ()
        return RecipeTasks(self.tasks, heads, trained, self.options)


def _check(tasks: Mapping[str, TaskSettings], seeds: int, learning_rates: Mapping[str, float]) -> None:
    if len(tasks) < 2:
        raise ValueError(f"a comparison fuses two tasks or more, the recipe has {len(tasks)}")
    if seeds < 1:
        raise ValueError(f"seeds has to be 1 or more, got {seeds}")
    known = list(dict.fromkeys(control.trained for control in CONTROLS))
    for method in learning_rates:
        if method not in known:
            raise ValueError(f"learning rate of '{method}': the methods are {', '.join(known)}")
    first, *others = tasks.values()
    for other in others:
        odd = [d for d in first.differences(other) if d.startswith(("model", "kind", "lora.", "point", "seed"))]
        if odd:
            raise ValueError(f"tasks '{first.name}' and '{other.name}' do not share one model: {'; '.join(odd)}")
    for settings in tasks.values():
        if settings.data.test is None:
            raise ValueError(
                f"task '{settings.name}' has no test split; options are chosen on validation: set data.test"
            )
