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


# Learning rates by the mean accuracy on validation images of the held-out tasks, seed 0, with 16 and 64 images; the
# linearized forms have that of their plain one.
#     LoRA      2e-3 0.672, 5e-3 0.708, 1e-2 0.683        Poly-z    0.1 0.670, 0.5 0.669
#     MHR-μ     2e-3 0.730, 5e-3 0.694                    MHR-z     0.1 0.680, 0.5 0.699
# The shared skill, Poly and MHR have that of MHR-μ.
ADAPTATIONS: dict[str, Method] = {
    "zero": Method("MHR, mean of the skills", "mhr", "nothing"),
    "lora": Method("LoRA", None, "adapter", None, 5e-3),
    "lora-layer": Method("LoRA, layer scope", None, "adapter", "layer", 5e-3),
    "lora-model": Method("LoRA, model scope", None, "adapter", "model", 5e-3),
    "shared": Method("shared skill", "shared", "adapter", None, 2e-3),
    "poly-z": Method("Poly-z", "poly", "logits", None, 0.1),
    "mhr-z": Method("MHR-z", "mhr", "logits", None, 0.5),
    "mhr-z-layer": Method("MHR-z, layer scope", "mhr", "logits", "layer", 0.5),
    "mhr-z-model": Method("MHR-z, model scope", "mhr", "weights", "model"),
    "poly": Method("Poly", "poly", "all", None, 2e-3),
    "mhr": Method("MHR", "mhr", "all", None, 2e-3),
    "mhr-mu": Method("MHR-μ", "mhr", "adapter", None, 2e-3),
    "mhr-mu-layer": Method("MHR-μ, layer scope", "mhr", "adapter", "layer", 2e-3),
    "mhr-mu-model": Method("MHR-μ, model scope", "mhr", "adapter", "model", 2e-3),
}
