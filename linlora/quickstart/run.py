"""The quickstart from start to end: prepare, fine-tune, fuse, time, report."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import linlora
from linlora.quickstart.experiment import prepare
from linlora.quickstart.figures import draw_cosine_matrices, draw_scaling_curve
from linlora.quickstart.finetune import fine_tune_all
from linlora.quickstart.fuse import fuse_all
from linlora.quickstart.progress import Costs, work_bar
from linlora.quickstart.report import reading, table
from linlora.quickstart.results import collect
from linlora.quickstart.settings import Settings
from linlora.quickstart.step_time import step_time
from linlora.quickstart.surroundings import surroundings
from linlora.quickstart.workers import crew_of
from linlora.storage.files import write_text
from linlora.storage.run_directory import only_run_in, open_run_directory, write_json

_OUTPUTS = {
    "results.json": "every number of the table, by task and seed, with settings and environment",
    "table.txt": "the table and its reading",
    "scaling_curve.png": "scaling coefficient against accuracy",
    "cosine_matrices.png": "cosines between the task vectors",
    "adapters/": "every task vector, with its adapter for stock PEFT (but for model scope, which has none)",
    "fused/": "the same of the fused vectors, with their scores",
    "backbone/": "the pre-trained ViT and the frozen heads",
}


def run(
    out: str | Path = "runs/quickstart",
    device: str = "cpu",
    seeds: int = 3,
    fresh: bool = False,
    settings: Settings | None = None,
    console: Console | None = None,
    processes: int = 2,
) -> dict[str, Any]:
    """Fine-tune, fuse and compare LoRA, plain and linearized at both scopes, on handwritten digits; print the report.

    A call with the same `out` and settings continues where an interrupted one was.

    Args:
        out: the run directory.
        device: "cpu", or "cuda" for the Triton kernels.
        seeds: how many; of every family and task, one adapter each is trained.
        fresh: start over in `out`.
        settings: the experiment; the defaults are the documented one.
        console: where to print.
        processes: how many adapters to train at a time; the results do not depend on it. With more than 1, a script
            has to call this under `if __name__ == "__main__":`, as always where processes are spawned.

    Returns: what `results.json` holds.

    Raises:
        DifferentSettingsError: `out` holds a run of other settings. FileExistsError: it holds something else, or
            another process is working in it.
        ValueError: no such device here, or fewer than one seed or process.
    """
    out, settings, console = Path(out), settings or Settings(), console or Console()
    if seeds < 1:
        raise ValueError(f"seeds has to be 1 or more, got {seeds}")
    if processes < 1:
        raise ValueError(f"processes has to be 1 or more, got {processes}")
    check_device(device)
    open_run_directory(out, settings.fingerprint(device), fresh, "quickstart")
    with only_run_in(out), surroundings(device, settings.threads):
        console.print(str(linlora.explain("linearized_lora_linear", device)), highlight=False, markup=False)
        results = _phases(settings, out, device, seeds, processes, console)
    _report(results, out, console)
    return results


def _phases(settings: Settings, out: Path, device: str, seeds: int, processes: int, console: Console) -> dict[str, Any]:
    begin = time.perf_counter()
    costs = Costs(settings, processes)
    with work_bar(console, costs, costs.total(seeds)) as bar:
        bar.now("pre-training")
        epoch = costs.epoch()
        experiment = prepare(settings, out, device, lambda: bar.advance(epoch), lambda: bar.skip(epoch))
        prepared = time.perf_counter()
        with crew_of(processes, experiment) as crew:
            runs = fine_tune_all(experiment, seeds, crew, bar)
            trained = time.perf_counter()
            scores = fuse_all(experiment, runs, crew, bar)
            fused = time.perf_counter()
        # the workers are gone: nothing of this run competes with the steps that are timed
        times = step_time(experiment, bar)
    end = time.perf_counter()
    found = sum(run.found for of_seed in runs.values() for run in of_seed)
    return {
        **collect(experiment, runs, scores, times, seeds),
        "wall_seconds": {
            "pretraining": prepared - begin,
            "fine_tuning": trained - prepared,
            "fusion": fused - trained,
            "step_time": end - fused,
            "total": end - begin,
        },
        "processes": processes,
        "adapters_found_from_earlier_call": found,
    }


def _report(results: dict[str, Any], out: Path, console: Console) -> None:
    write_json(out / "results.json", results)
    draw_scaling_curve(results, out / "scaling_curve.png")
    draw_cosine_matrices(results, out / "cosine_matrices.png")
    file = StringIO()
    for place in (console, Console(file=file, width=100)):
        place.print(table(results))
        place.print(reading(results), highlight=False)
    write_text(out / "table.txt", file.getvalue())
    wall = results["wall_seconds"]
    phases = ", ".join(f"{name.replace('_', ' ')} {seconds:.0f} s" for name, seconds in wall.items() if name != "total")
    console.print(f"\n{wall['total']:.0f} s: {phases}. Written to {out}:", highlight=False)
    for name, what in _OUTPUTS.items():
        console.print(f"  {name:20s} {what}", highlight=False)


def check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"unknown device {device!r}: choose 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device '{device}' is not available: this torch ({torch.__version__}) sees no CUDA GPU. Run with "
            "--device cpu, or install a CUDA build of torch on a machine with an NVIDIA GPU"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device '{device}' is not available: there are {torch.cuda.device_count()} GPUs, from cuda:0")
