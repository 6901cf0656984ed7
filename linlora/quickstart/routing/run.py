"""The routing quickstart from start to end: prepare, train the inventories, adapt, report."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import linlora
from linlora import experiments
from linlora.experiments.environment import check_device, surroundings
from linlora.experiments.jobs import Job, Workers
from linlora.experiments.run import Experiment, Report
from linlora.quickstart.routing.adaptation import RECORD_FILE, adapt_all
from linlora.quickstart.routing.figures import draw_accuracies, draw_routing
from linlora.quickstart.routing.inventories import INVENTORY_FILE, TRAINING_FILE, train_inventory
from linlora.quickstart.routing.methods import ADAPTATIONS, INVENTORIES, INVENTORY_TITLES
from linlora.quickstart.routing.report import reading, table
from linlora.quickstart.routing.results import collect
from linlora.quickstart.routing.settings import RoutingSettings
from linlora.quickstart.routing.workplace import Workplace

_OUTPUTS = {
    "results.json": "every number of the table, by task and seed, with settings and environment",
    "table.txt": "the table and its reading",
    "accuracies.png": "accuracy by method and number of labelled images",
    "routing.png": "the weights MHR gives the skills, by task, and how alike tasks are routed",
    "inventories/": "the trained inventories, for linlora.routing.RoutedModel.from_pretrained",
    "adaptations/": "the scores of every adaptation",
}


def run(
    out: str | Path = "runs/quickstart-routing",
    device: str = "cpu",
    seeds: int = 3,
    fresh: bool = False,
    settings: RoutingSettings | None = None,
    console: Console | None = None,
    workers: Workers = 2,
) -> dict[str, Any]:
    """Train inventories of skills on many tasks and adapt to held-out ones by every method; print and draw the report.

    A call with the same `out` and settings continues where an interrupted one was. Arguments and errors are those of
    `linlora.quickstart.run`. Returns what `results.json` holds.
    """
    check_device(device)
    experiment, console = RoutingExperiment(settings or RoutingSettings(), Path(out), device), console or Console()
    console.print(str(linlora.explain(experiment.op, device)), highlight=False, markup=False)
    return experiments.run(experiment, "routing quickstart", seeds, workers, fresh, console)


class RoutingExperiment(Workplace, Experiment):
    """Inventories, then adaptations to the held-out tasks."""

    op = "routed_lora_linear"

    def fingerprint(self) -> dict[str, Any]:
        return asdict(self.settings)

    def around(self) -> AbstractContextManager[None]:
        return surroundings(self.device, self.settings.threads)

    def phases(self, seeds: int) -> list[list[Job]]:
        return [*self.prepared(), self._inventories(seeds), self._adaptations(seeds)]

    def _inventories(self, seeds: int) -> list[Job]:
        return [
            Job(
                f"trained {INVENTORY_TITLES[inventory]}, seed {seed}", self.inventory_folder(inventory, seed),
                (INVENTORY_FILE, TRAINING_FILE), functools.partial(train_inventory, self, inventory, seed), (self.out,),
            )
            for seed in range(seeds) for inventory in INVENTORIES
        ]  # fmt: skip

    def _adaptations(self, seeds: int) -> list[Job]:
        return [
            Job(
                f"adapted by {method.title}, {shots} images, seed {seed}", self.adaptation_folder(name, shots, seed),
                (RECORD_FILE,), functools.partial(adapt_all, self, name, shots, seed),
                (self.inventory_folder(method.inventory, seed) if method.inventory else self.out,),
            )
            for seed in range(seeds) for shots in self.settings.shots for name, method in ADAPTATIONS.items()
        ]  # fmt: skip

    def results(self, seeds: int) -> dict[str, Any]:
        return collect(self, seeds)

    def report(self, results: dict[str, Any]) -> Report:
        draw_accuracies(results, self.out / "accuracies.png")
        draw_routing(results, self.out / "routing.png")
        return Report([table(results)], reading(results), _OUTPUTS)
