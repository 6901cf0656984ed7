"""Every number of the quickstart in one place, with the measurement behind those that were chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import linlora

Family = Literal["lora", "linearized"]
FAMILIES: tuple[Family, ...] = ("lora", "linearized")
FAMILY_TITLES = {"lora": "LoRA", "linearized": "linearized LoRA"}


@dataclass(frozen=True)
class Settings:
    """What a run directory was made with. Two runs of equal settings share their artefacts; others are refused."""

    # the vision transformer: 8 x 8 pixels in 2 x 2 patches, 16 tokens and the class token
    hidden_size: int = 64
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 128

    # pre-training: upright digits, slightly moved
    pretraining_epochs: int = 60
    pretraining_batch: int = 64
    pretraining_learning_rate: float = 1e-3

    # fine-tuning: the same rank, steps, batches and schedule for both families
    rank: int = 8
    alpha: int = 16
    steps: int = 100
    batch: int = 64
    weight_decay: float = 0.01
    lora_learning_rate: float = 3e-3
    linearized_learning_rate: float = 3e-3

    # fusion: the grid of scaling coefficients, searched on the validation split
    scalings: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(16))

    # step time: interleaved steps, of which the first are not counted
    timed_steps: int = 40
    warmup_steps: int = 5

    tasks: tuple[str, ...] | None = None  # None: all of linlora.quickstart.tasks.TASKS

    def learning_rate(self, family: Family) -> float:
        return self.lora_learning_rate if family == "lora" else self.linearized_learning_rate

    def fingerprint(self, device: str) -> dict[str, Any]:
        """What has to be equal for a run directory to be continued. More seeds may be added to one, so they are not
        part of it; the device and the version are, because results of two would be mixed in one table."""
        return {"linlora": linlora.__version__, "device": device, **asdict(self)}
