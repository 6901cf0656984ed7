"""What is compared: how a held-out task is adapted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

INVENTORIES = ("shared", "poly", "mhr")
INVENTORY_TITLES = {"shared": "one shared skill", "poly": "Poly", "mhr": "MHR"}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        inventory: of INVENTORIES, what it starts from; None: a new adapter.
        trains: "nothing" (the mean of the skills as it is), "logits" of a new task (-z), "weights" of a new task by a
            convex fit, "adapter" (the mean of the skills collapsed into one adapter, -μ) or "all" skills and logits.
        scope: of the linearization, at the inventory's mean or, without one, at B0 = 0; None: plain.
        learning_rate: of AdamW, falling to zero; 0 where no step is taken.
    """

    title: str
    inventory: str | None
    trains: Literal["nothing", "logits", "weights", "adapter", "all"]
    scope: Literal["layer", "model"] | None = None
    learning_rate: float = 0.0


METHODS: dict[str, Method] = {
    "zero": Method("MHR, mean of the skills, no training", "mhr", "nothing"),
    "lora": Method("LoRA from scratch", None, "adapter", None, 1e-2),
    "lora-layer": Method("LoRA from scratch, layer scope", None, "adapter", "layer", 1e-2),
    "lora-model": Method("LoRA from scratch, model scope", None, "adapter", "model", 1e-2),
    "shared": Method("shared skill, fine-tuned", "shared", "adapter", None, 2e-3),
    "poly-z": Method("Poly-z", "poly", "logits", None, 0.5),
    "mhr-z": Method("MHR-z", "mhr", "logits", None, 0.5),
    "mhr-z-layer": Method("MHR-z, layer scope", "mhr", "logits", "layer", 0.5),
    "mhr-z-model": Method("MHR-z, model scope, convex fit", "mhr", "weights", "model"),
    "poly": Method("Poly", "poly", "all", None, 2e-3),
    "mhr": Method("MHR", "mhr", "all", None, 2e-3),
    "mhr-mu": Method("MHR-μ", "mhr", "adapter", None, 2e-3),
    "mhr-mu-layer": Method("MHR-μ, layer scope", "mhr", "adapter", "layer", 2e-3),
    "mhr-mu-model": Method("MHR-μ, model scope", "mhr", "adapter", "model", 2e-3),
}
