"""What a training step costs, in one interleaved loop: of every family, and of the linearized ones by `torch.func`."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from linlora import baselines
from linlora.quickstart.experiment import Experiment
from linlora.quickstart.progress import Costs, WorkBar
from linlora.quickstart.settings import Family, Settings
from linlora.quickstart.train import adapted, of_family, training_steps
from linlora.storage.run_directory import is_whole, read_json, write_json

FILE = "step_time.json"
# Each version with the family whose function and learning rate it has.
VERSIONS: dict[str, Family] = {
    "lora": "lora",
    "layer": "layer",
    "model": "model",
    "layer_torch_func": "layer",
    "model_torch_func": "model",
}


def step_time(experiment: Experiment, bar: WorkBar[Costs]) -> dict[str, Any]:
    """The median step of each version in milliseconds, and how far the losses of linlora and `torch.func` differ."""
    bar.now("step time")
    if is_whole(experiment.out, FILE):
        bar.skip(bar.costs.step_time())
    else:
        write_json(experiment.out / FILE, measure(experiment, bar))
    return read_json(experiment.out / FILE)


def measure(experiment: Experiment, bar: WorkBar[Costs]) -> dict[str, Any]:
    """Train the first task in every version, a step of each in turn, so that a busy machine is busy for all alike.

    All see the same batches from the same adapter, so if linlora and `torch.func` are the same training, their losses
    are equal but for rounding.
    """
    settings = replace(experiment.settings, steps=experiment.settings.timed_steps)
    task = experiment.tasks[0].name
    head, train = experiment.heads[task], experiment.splits[task]["train"]
    trainings = {
        version: training_steps(
            model_of(version, experiment.backbone, settings), head, train, settings, settings.learning_rate(family), 0
        )
        for version, family in VERSIONS.items()
    }
    losses: dict[str, list[float]] = {version: [] for version in VERSIONS}
    milliseconds: dict[str, list[float]] = {version: [] for version in VERSIONS}
    order = list(VERSIONS)
    for _ in range(settings.steps):
        order.append(order.pop(0))
        for version in order:
            _synchronize(experiment.device)
            start = time.perf_counter()
            loss = next(trainings[version])
            _synchronize(experiment.device)
            milliseconds[version].append(1e3 * (time.perf_counter() - start))
            losses[version].append(loss.item())
            bar.advance(bar.costs.timed_step(version))
    return {
        "median_ms": {name: statistics.median(times[settings.warmup_steps :]) for name, times in milliseconds.items()},
        "max_loss_difference": {
            scope: max(
                abs(ours - theirs) for ours, theirs in zip(losses[scope], losses[f"{scope}_torch_func"], strict=True)
            )
            for scope in ("layer", "model")
        },
        "steps": settings.steps,
        "losses": losses,
    }


def model_of(version: str, backbone: nn.Module, settings: Settings) -> nn.Module:
    model = adapted(backbone, settings, seed=0)
    if version == "layer_torch_func":
        return baselines.linearize_with_functorch(model, "all")
    if version == "model_torch_func":
        return baselines.FunctorchModel(model)
    return of_family(model, VERSIONS[version])


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
