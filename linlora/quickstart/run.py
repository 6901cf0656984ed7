"""`run`: a packaged experiment from start to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

import linlora
from linlora import experiments
from linlora.experiments.environment import check_device
from linlora.experiments.images import ImageExperiment, Settings
from linlora.experiments.jobs import Workers
from linlora.experiments.step_time import timing
from linlora.quickstart.settings import QUICKSTART


def run(
    out: str | Path = "runs/quickstart",
    device: str = "cpu",
    seeds: int = 3,
    fresh: bool = False,
    settings: Settings = QUICKSTART,
    console: Console | None = None,
    workers: Workers = 2,
    job: str = "quickstart",
) -> dict[str, Any]:
    """Fine-tune, fuse and compare LoRA, plain and linearized at both scopes, on the packaged tasks; print the report.

    A call with the same `out` and settings continues where an interrupted one was. Arguments, result and errors are
    those of `linlora.experiments.run`, and:

    Args:
        device: "cpu", or "cuda" for the Triton kernels.
        settings: the experiment; the default is the documented one.

    Raises ValueError for a device that is not here.
    """
    check_device(device)
    experiment, console = ImageExperiment(settings, Path(out), device), console or Console()
    console.print(str(linlora.explain("linearized_lora_linear", device)), highlight=False, markup=False)
    return experiments.run(experiment, job, seeds, workers, fresh, console, timing(experiment))
