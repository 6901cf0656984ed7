"""The routing quickstart from start to end: prepare, train the inventories, adapt, report."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

import linlora
from linlora.quickstart.progress import work_bar
from linlora.quickstart.routing.adaptation import adapt_all, is_adapted
from linlora.quickstart.routing.costs import RoutingCosts
from linlora.quickstart.routing.experiment import RoutingExperiment, prepare
from linlora.quickstart.routing.figures import draw_accuracies, draw_routing
from linlora.quickstart.routing.inventories import is_trained, train_inventory
from linlora.quickstart.routing.methods import INVENTORIES, INVENTORY_TITLES, METHODS
from linlora.quickstart.routing.report import reading, table
from linlora.quickstart.routing.results import collect
from linlora.quickstart.routing.settings import RoutingSettings
from linlora.quickstart.run import check_device
from linlora.quickstart.surroundings import surroundings
from linlora.quickstart.workers import Crew, crew_of
from linlora.storage.files import write_text
from linlora.storage.run_directory import only_run_in, open_run_directory, write_json

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
    processes: int = 2,
) -> dict[str, Any]:
    """Train inventories of skills on many tasks and adapt to held-out ones by every method; print and draw the report.

    A call with the same `out` and settings continues where an interrupted one was. Arguments and errors are those of
    `linlora.quickstart.run`. Returns what `results.json` holds.
    """
    out, settings, console = Path(out), settings or RoutingSettings(), console or Console()
    if seeds < 1 or processes < 1:
        raise ValueError(f"seeds and processes have to be 1 or more, got {seeds} and {processes}")
    check_device(device)
    open_run_directory(out, settings.fingerprint(device), fresh, "routing quickstart")
    begin = time.perf_counter()
    with only_run_in(out), surroundings(device, settings.quickstart.threads):
        console.print(str(linlora.explain("routed_lora_linear", device)), highlight=False, markup=False)
        experiment = _phases(settings, out, device, seeds, processes, console)
        results = collect(experiment, seeds)
    results |= {"wall_seconds": time.perf_counter() - begin, "processes": processes}
    _report(results, out, console)
    return results


def _phases(
    settings: RoutingSettings, out: Path, device: str, seeds: int, processes: int, console: Console
) -> RoutingExperiment:
    costs = RoutingCosts(settings, processes)
    with work_bar(console, costs, costs.total(seeds)) as bar:
        bar.now("pre-training")
        epoch = costs.quickstart.epoch()
        experiment = prepare(settings, out, device, lambda: bar.advance(epoch), lambda: bar.skip(epoch))
        with crew_of(processes, experiment) as crew:
            _train_inventories(experiment, seeds, crew, bar)
            _adapt(experiment, seeds, crew, bar)
    return experiment


def _train_inventories(experiment: RoutingExperiment, seeds: int, crew: Crew, bar: Any) -> None:
    jobs = [(inventory, seed) for seed in range(seeds) for inventory in INVENTORIES]
    missing = [job for job in jobs if not is_trained(experiment, *job)]
    bar.skip((len(jobs) - len(missing)) * bar.costs.inventory())
    bar.now("training inventories")
    for inventory, seed in crew(train_inventory, missing):
        bar.advance(bar.costs.inventory())
        bar.now(f"trained {INVENTORY_TITLES[inventory]}, seed {seed}")


def _adapt(experiment: RoutingExperiment, seeds: int, crew: Crew, bar: Any) -> None:
    shots = experiment.settings.shots
    jobs = [(method, count, seed) for seed in range(seeds) for count in shots for method in METHODS]
    missing = [job for job in jobs if not is_adapted(experiment, *job)]
    bar.skip(sum(bar.costs.adaptation(method, count) for method, count, _ in set(jobs) - set(missing)))
    bar.now("adapting")
    for method, count, seed in crew(adapt_all, missing):
        bar.advance(bar.costs.adaptation(method, count))
        bar.now(f"adapted by {METHODS[method].title}, {count} images, seed {seed}")


def _report(results: dict[str, Any], out: Path, console: Console) -> None:
    write_json(out / "results.json", results)
    draw_accuracies(results, out / "accuracies.png")
    draw_routing(results, out / "routing.png")
    file = StringIO()
    for place in (console, Console(file=file, width=110)):
        place.print(table(results))
        place.print(reading(results), highlight=False)
    write_text(out / "table.txt", file.getvalue())
    console.print(f"\n{results['wall_seconds']:.0f} s. Written to {out}:", highlight=False)
    for name, what in _OUTPUTS.items():
        console.print(f"  {name:20s} {what}", highlight=False)
