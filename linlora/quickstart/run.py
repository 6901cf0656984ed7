"""The quickstart from start to end: prepare, fine-tune, fuse, time, report."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

import linlora
from linlora.files import write_text
from linlora.quickstart.artifacts import only_run_in, open_run_directory, write_json
from linlora.quickstart.data import load_digits
from linlora.quickstart.experiment import prepare
from linlora.quickstart.figures import draw_cosine_matrices, draw_scaling_curve
from linlora.quickstart.finetune import fine_tune_all, run_cost
from linlora.quickstart.fuse import fuse_all, fusion_cost
from linlora.quickstart.progress import STEP_COST, work_bar
from linlora.quickstart.report import reading, table
from linlora.quickstart.results import collect
from linlora.quickstart.settings import FAMILIES, Settings
from linlora.quickstart.step_time import step_time, step_time_cost
from linlora.quickstart.tasks import select_tasks

_OUTPUTS = {
    "results.json": "every number of the table, by task and seed, with settings and environment",
    "table.txt": "the table and its reading",
    "scaling_curve.png": "scaling coefficient against accuracy",
    "cosine_matrices.png": "cosines between the task vectors",
    "adapters/": "every adapter, for stock PEFT, with its task vector",
    "fused/": "the fused adapters and vectors, with their scores",
    "backbone/": "the pre-trained ViT and the frozen heads",
}


def run(
    out: str | Path = "runs/quickstart",
    device: str = "cpu",
    seeds: int = 3,
    fresh: bool = False,
    settings: Settings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Fine-tune, fuse and compare plain LoRA and linearized LoRA on handwritten digits; print and save the report.

    A call with the same `out` and settings continues where an interrupted one was.

    Args:
        out: the run directory.
        device: "cpu", or "cuda" for the Triton kernels.
        seeds: how many; of every family and task, one adapter each is trained.
        fresh: start over in `out`.
        settings: the experiment; the defaults are the documented one.
        console: where to print.

    Returns: what `results.json` holds.

    Raises:
        DifferentSettingsError: `out` holds a run of other settings. FileExistsError: it holds something else, or
            another process is working in it.
        ValueError: no such device here, or fewer than one seed.
    """
    out, settings, console = Path(out), settings or Settings(), console or Console()
    if seeds < 1:
        raise ValueError(f"seeds has to be 1 or more, got {seeds}")
    _check_device(device)
    open_run_directory(out, settings.fingerprint(device), fresh)
    with only_run_in(out), _kernels(device), _threads(settings.threads), _quiet_transformers():
        console.print(str(linlora.explain("linearized_lora_linear", device)), highlight=False, markup=False)
        results = _phases(settings, out, device, seeds, console)
    _report(results, out, console)
    return results


def _phases(settings: Settings, out: Path, device: str, seeds: int, console: Console) -> dict[str, Any]:
    begin = time.perf_counter()
    epoch_cost, total = _work(settings, seeds)
    with work_bar(console, total) as bar:
        bar.now("pre-training")
        experiment = prepare(settings, out, device, lambda: bar.advance(epoch_cost), lambda: bar.skip(epoch_cost))
        prepared = time.perf_counter()
        runs = fine_tune_all(experiment, seeds, bar)
        trained = time.perf_counter()
        scores = fuse_all(experiment, runs, bar)
        fused = time.perf_counter()
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
        "adapters_found_from_earlier_call": found,
    }


def _work(settings: Settings, seeds: int) -> tuple[int, int]:
    """Images through the network in one epoch of pre-training, and in the whole run."""
    indices = load_digits().indices
    tasks = len(select_tasks(settings.tasks))
    epoch = STEP_COST * len(indices["train"])
    return epoch, (
        epoch * settings.pretraining_epochs
        + len(FAMILIES) * seeds * tasks * run_cost(settings.steps, settings.batch)
        + len(FAMILIES) * seeds * fusion_cost(settings, tasks, len(indices["validation"]), len(indices["test"]))
        + step_time_cost(settings.timed_steps, settings.batch)
    )


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


def _kernels(device: str) -> AbstractContextManager[None]:
    """On a GPU the kernels are asked for by name, so that the run is of the kernels or an error, never a fallback."""
    return linlora.use_backend("triton") if device.startswith("cuda") else nullcontext()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Our bar is the only one: a tiny backbone needs none to be saved, nor warnings for library authors."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_device(device: str) -> None:
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
