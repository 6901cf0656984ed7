"""The routing quickstart from start to end: prepare, train the inventories, adapt, report."""

from __future__ import annotations

import functools
import time
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

import linlora
from linlora.experiments.environment import check_device
from linlora.experiments.jobs import Job, Workers, run_jobs
from linlora.experiments.report import print_outputs
from linlora.experiments.run import opened
from linlora.quickstart.routing.adaptation import RECORD_FILE, adapt_all
from linlora.quickstart.routing.experiment import RoutingExperiment
from linlora.quickstart.routing.figures import draw_accuracies, draw_routing
from linlora.quickstart.routing.inventories import INVENTORY_FILE, TRAINING_FILE, train_inventory
from linlora.quickstart.routing.methods import ADAPTATIONS, INVENTORIES, INVENTORY_TITLES
from linlora.quickstart.routing.report import reading, table
from linlora.quickstart.routing.results import collect
from linlora.quickstart.routing.settings import RoutingSettings
from linlora.storage.files import write_text
from linlora.storage.run_directory import write_json

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
    out, settings, console = Path(out), settings or RoutingSettings(), console or Console()
    check_device(device)
    begin = time.perf_counter()
    experiment = RoutingExperiment(settings, out, device)
    with opened(out, settings.fingerprint(device), "routing quickstart", seeds, workers, fresh) as stack:
        stack.enter_context(experiment.around())
        console.print(str(linlora.explain("routed_lora_linear", device)), highlight=False, markup=False)
        run_jobs([*experiment.prepared(), *_phases(experiment, seeds)], workers, experiment.around, console)
        results = collect(experiment, seeds)
        results |= {"wall_seconds": time.perf_counter() - begin, "workers": workers}
        _report(results, out, console)
    return results


def _phases(experiment: RoutingExperiment, seeds: int) -> list[list[Job]]:
    inventories = [
        Job(
            f"trained {INVENTORY_TITLES[inventory]}, seed {seed}", experiment.inventory_folder(inventory, seed),
            (INVENTORY_FILE, TRAINING_FILE), functools.partial(train_inventory, experiment, inventory, seed),
        )
        for seed in range(seeds) for inventory in INVENTORIES
    ]  # fmt: skip
    adaptations = [
        Job(
            f"adapted by {method.title}, {shots} images, seed {seed}", experiment.adaptation_folder(name, shots, seed),
            (RECORD_FILE,), functools.partial(adapt_all, experiment, name, shots, seed),
            (experiment.inventory_folder(method.inventory, seed),) if method.inventory else (),
        )
        for seed in range(seeds) for shots in experiment.settings.shots for name, method in ADAPTATIONS.items()
    ]  # fmt: skip
    return [inventories, adaptations]


def _report(results: dict[str, Any], out: Path, console: Console) -> None:
    write_json(out / "results.json", results)
    draw_accuracies(results, out / "accuracies.png")
    draw_routing(results, out / "routing.png")
    file = StringIO()
    for place in (console, Console(file=file, width=110)):
        place.print(table(results))
        place.print(reading(results), highlight=False)
    write_text(out / "table.txt", file.getvalue())
    print_outputs(results["wall_seconds"], out, _OUTPUTS, console)
