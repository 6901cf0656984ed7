"""The cost of a training step, in one interleaved loop: of every kind, and of the linearized ones by `torch.func`."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linlora import baselines
from linlora.experiments.comparison import STEP_TIME_FILE
from linlora.experiments.controls import Trained
from linlora.experiments.images import ImageExperiment, Settings, adapted, of_kind, training_steps
from linlora.experiments.jobs import Job
from linlora.storage.run_directory import write_json

# Each version with the kind of training whose function and learning rate it has.
VERSIONS: dict[str, Trained] = {
    "lora": "lora",
    "layer": "layer",
    "model": "model",
    "layer_torch_func": "layer",
    "model_torch_func": "model",
}


def timing(experiment: ImageExperiment) -> list[Job]:
    """The job that measures, for a process that nothing competes with; none where no step is to be timed."""
    measured = functools.partial(_write, experiment, experiment.out / STEP_TIME_FILE)
    return [Job("timed steps", experiment.out, (STEP_TIME_FILE,), measured)] * bool(experiment.settings.timed_steps)


def _write(experiment: ImageExperiment, path: Path) -> None:
    write_json(path, measure(experiment))


def measure(experiment: ImageExperiment) -> dict[str, Any]:
    """The median step of each version in milliseconds, and how far the losses of linlora and `torch.func` differ.

    The first task is trained in every version, a step of each in turn, so that a busy machine is busy for all alike.
    All see the same batches from the same adapter, so if linlora and `torch.func` are the same training, their losses
    are equal but for rounding.
    """
    settings = replace(experiment.settings, steps=experiment.settings.timed_steps)
    suite, task = experiment.suite, experiment.names[0]
    head, train = suite.heads[task], suite.splits[task]["train"]
    trainings = {
        version: training_steps(
            model_of(version, suite.network, settings), head, train, settings, settings.learning_rate("zero", kind), 0
        )
        for version, kind in VERSIONS.items()
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
    return {
        "median_ms": {name: statistics.median(times[settings.untimed_steps :]) for name, times in milliseconds.items()},
        "max_loss_difference": {
            scope: max(
                abs(ours - theirs) for ours, theirs in zip(losses[scope], losses[f"{scope}_torch_func"], strict=True)
            )
            for scope in ("layer", "model")
        },
        "steps": settings.steps,
        "losses": losses,
    }


def model_of(version: str, network: nn.Module, settings: Settings) -> nn.Module:
    model = adapted(network, settings, seed=0)
    if version == "layer_torch_func":
        return baselines.linearize_with_functorch(model, "all")
    if version == "model_torch_func":
        return baselines.FunctorchModel(model)
    return of_kind(model, VERSIONS[version])


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
