"""What the phases cost, in images through the network, for the time left that the progress bar shows."""

from __future__ import annotations

from dataclasses import dataclass

from linlora.quickstart.data import load_digits
from linlora.quickstart.progress import Costs, image_cost
from linlora.quickstart.routing.methods import INVENTORIES, METHODS
from linlora.quickstart.routing.settings import RoutingSettings

_PASSES_OF_FIT = 10  # of `fit_routing`: one for each label that a question may have


@dataclass(frozen=True)
class RoutingCosts:
    """In the unit of the quickstart's `Costs`; a routed step costs about what a step of LoRA does."""

    settings: RoutingSettings
    processes: int

    @property
    def quickstart(self) -> Costs:
        return Costs(self.settings.quickstart, self.processes)

    def inventory(self) -> int:
        """Training one."""
        return image_cost("lora", of_step=True) * self.settings.steps * self.settings.batch

    def adaptation(self, method: str, shots: int) -> int:
        """All held-out tasks by one method, from one seed."""
        chosen, indices = METHODS[method], load_digits().indices
        family = chosen.scope or "lora"
        images = {
            "nothing": 0,
            "weights": _PASSES_OF_FIT * shots,
        }.get(chosen.trains, self.settings.adaptation_steps * min(self.settings.adaptation_batch, shots))
        evaluated = len(indices["validation"]) + len(indices["test"])
        of_task = image_cost(family, of_step=True) * images + image_cost(family) * evaluated
        return len(self.settings.domains) * of_task

    def total(self, seeds: int) -> int:
        """The whole run."""
        adaptations = sum(self.adaptation(method, shots) for method in METHODS for shots in self.settings.shots)
        pretraining = self.settings.quickstart.pretraining_epochs * self.quickstart.epoch()
        return pretraining + seeds * (len(INVENTORIES) * self.inventory() + adaptations)
