"""What a training step costs: plain LoRA, linlora, and `torch.func` for the same training, in one interleaved loop."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

import linlora
from linlora.quickstart.artifacts import is_whole, read_json, write_json
from linlora.quickstart.experiment import Experiment
from linlora.quickstart.progress import STEP_COST, WorkBar
from linlora.quickstart.train import adapted, of_family, training_steps

FILE = "step_time.json"
VERSIONS = ("lora", "linearized", "torch_func")


def step_time(experiment: Experiment, bar: WorkBar) -> dict[str, Any]:
    """The median step of each version in milliseconds, and how far the losses of the two linearized ones differ."""
    bar.now("step time")
    if is_whole(experiment.out, FILE):
        bar.skip(step_time_cost(experiment.settings.timed_steps, experiment.settings.batch))
    else:
        write_json(experiment.out / FILE, measure(experiment, bar))
    return read_json(experiment.out / FILE)


def step_time_cost(steps: int, batch: int) -> int:
    return STEP_COST * len(VERSIONS) * steps * batch


def measure(experiment: Experiment, bar: WorkBar) -> dict[str, Any]:
    """Train the first task in three versions, a step of each in turn, so that a busy machine is busy for all alike.

    All see the same batches from the same adapter. The linearized ones also have the same learning rate, so if linlora
    and `torch.func` are the same training, their losses are equal but for rounding.
    """
    settings = replace(experiment.settings, steps=experiment.settings.timed_steps)
    task = experiment.tasks[0]
    head, train = experiment.heads[task.name], experiment.splits[task.name]["train"]
    models = {
        "lora": adapted(experiment.backbone, settings, seed=0),
        "linearized": of_family(adapted(experiment.backbone, settings, seed=0), "linearized"),
        "torch_func": linlora.baselines.linearize_with_functorch(adapted(experiment.backbone, settings, seed=0), "all"),
    }
    trainings = {
        name: training_steps(
            model, head, train, settings, settings.learning_rate("lora" if name == "lora" else "linearized"), seed=0
        )
        for name, model in models.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in VERSIONS}
    milliseconds: dict[str, list[float]] = {name: [] for name in VERSIONS}
    for step in range(settings.steps):
        turn = step % len(VERSIONS)
        for name in VERSIONS[turn:] + VERSIONS[:turn]:
            _synchronize(experiment.device)
            start = time.perf_counter()
            loss = next(trainings[name])
            _synchronize(experiment.device)
            milliseconds[name].append(1e3 * (time.perf_counter() - start))
            losses[name].append(loss.item())
            bar.advance(STEP_COST * settings.batch)
    pairs = zip(losses["linearized"], losses["torch_func"], strict=True)
    return {
        "median_ms": {name: statistics.median(times[settings.warmup_steps :]) for name, times in milliseconds.items()},
        "max_loss_difference": max(abs(ours - theirs) for ours, theirs in pairs),
        "steps": settings.steps,
        "losses": losses,
    }


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
