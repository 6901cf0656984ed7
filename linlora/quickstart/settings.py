"""Every number of the quickstart in one place, with the measurement behind those that were chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import linlora

Family = Literal["lora", "layer", "model"]  # plain, or the scope of the linearization
FAMILIES: tuple[Family, ...] = ("lora", "layer", "model")
FAMILY_TITLES = {"lora": "LoRA", "layer": "linearized, layer scope", "model": "linearized, model scope"}


@dataclass(frozen=True)
class Settings:
    """What a run directory was made with. Two runs of equal settings share their artefacts; others are refused."""

    # the vision transformer: 8 x 8 pixels in 2 x 2 patches, 16 tokens and the class token
    hidden_size: int = 64
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 128

    # pre-training: upright digits, slightly moved
    pretraining_epochs: int = 80
    pretraining_batch: int = 64
    pretraining_learning_rate: float = 1e-3

    # the heads: logistic regression on the pre-trained features of this many labelled images, then frozen
    head_images: int = 100

    # fine-tuning: the same rank, steps, batches and schedule for every family
    rank: int = 8
    alpha: int = 16
    steps: int = 100
    batch: int = 64
    weight_decay: float = 0.01
    # Chosen for each family by the mean validation accuracy of its single-task adapters, seed 0:
    #     learning rate    1e-3    3e-3    5e-3    1e-2    2e-2
    #     LoRA            0.900   0.937   0.946   0.916   0.664
    #     layer scope     0.887   0.910   0.928   0.914   0.866
    #     model scope     0.875   0.895   0.901   0.907   0.905
    # How well the adapters fuse had no say in it.
    lora_learning_rate: float = 5e-3
    layer_learning_rate: float = 5e-3
    model_learning_rate: float = 1e-2

    # fusion: the grid of scaling coefficients, searched on the validation split
    scalings: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)

    # step time: interleaved steps, of which the first are not counted
    timed_steps: int = 40
    warmup_steps: int = 5

    # CPU threads. The tensors are so small that a second thread gains nothing (32 ms a step of pre-training with two,
    # 31 ms with one), and where cores are shared two that wait for each other cost a lot (3 s a fine-tuning became
    # 20 to 90 s; with one thread 4 s). With one, results do not depend on the number of cores either.
    threads: int = 1

    tasks: tuple[str, ...] | None = None  # None: all of linlora.quickstart.tasks.TASKS

    def learning_rate(self, family: Family) -> float:
        return {
            "lora": self.lora_learning_rate,
            "layer": self.layer_learning_rate,
            "model": self.model_learning_rate,
        }[family]

    def fingerprint(self, device: str) -> dict[str, Any]:
        """What has to be equal for a run directory to be continued. More seeds may be added to one, so they are not
        part of it; the device and the version are, because results of two would be mixed in one table."""
        return {"linlora": linlora.__version__, "device": device, **asdict(self)}
