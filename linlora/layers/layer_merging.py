"""The layer's adapters folded into its base weight and taken out again, by the names that PEFT's methods call."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from linlora.layers.adapters import LoraAdapters
from linlora.layers.sharding import check_weight
from linlora.layers.weights import Update, check_sum, fold, fold_keeping, stacked, unfold
from linlora.storage.tensors import finite


class MergeableAdapters(LoraAdapters):
    """Adapters that merge into the weight of their layer with one rounding, and unmerge to the bits it had."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter in fp32 (or wider), in the layout of the base weight; PEFT's name for it."""
        update = self._update([adapter])
        return update.left @ update.right

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight: their ΔW are summed with it in fp32 and rounded once.

        What rounding loses is kept, so that `unmerge` restores the bits of the weight.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        weight = self.get_base_layer().weight.data
        kept = fold_keeping(weight, self.update_that_fits(names))
        if safe_merge and not finite(weight):
            unfold(weight, kept)
            raise ValueError(
                f"layer '{self.layer_name}': merging {names} gives NaN or infinity; the weight is unchanged"
            )
        self.folds.append(kept)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again: its bits are those it had before `merge`."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)  # PEFT's words
        weight = self.get_base_layer().weight.data
        while self.folds:
            try:
                unfold(weight, self.folds[-1])
            except (ValueError, RuntimeError) as error:
                raise type(error)(f"layer '{self.layer_name}': {error}") from error
            self.folds.pop()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, which PEFT's `merge_and_unload` and `unload` put in this one's place; nothing undoes it."""
        base = self.get_base_layer()
        if not merge or set(adapter_names or self.active_adapters) <= set(self.merged_adapters):
            return base
        names = check_adapters_to_merge(self, adapter_names)
        if safe_merge:
            self.merge(True, names)
        elif names := [name for name in names if name in self.lora_A]:
            fold(base.weight.data, self.update_that_fits(names))
        return base

    def update_that_fits(self, adapters: list[str]) -> Update:
        """The sum of the ΔW of some adapters, to be folded. Raises ValueError where the weight would not hold it."""
        base = self.get_base_layer()
        check_weight(f"layer '{self.layer_name}'", "its base layer", base, ", so ΔW would be lost")
        update = self._update(adapters)
        try:
            check_sum(base.weight.data, update)
        except OverflowError as error:
            raise ValueError(
                f"layer '{self.layer_name}': merging {adapters} gives NaN or infinity; the weight is unchanged. {error}"
            ) from error
        return update

    @torch.no_grad()
    def _update(self, adapters: list[str]) -> Update:
        """The sum of the ΔW of some adapters."""
        if self.stream is not None:
            raise ValueError(self._no_weight())
        weight = self.get_base_layer().weight
        parts = [stacked(A0, B0, dA, dB, s, weight) for A0, B0, dA, dB, s in map(self.factors, adapters)]
        A, B = torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1)
        return Update(A, B, self.fan_in_fan_out)

    def _no_weight(self) -> str:
        return (
            f"layer '{self.layer_name}': a model linearized at model scope does not fold into weights, because its "
            "tangent runs through the whole network; serve it with both streams, or give up the exact function: "
            "linlora.set_scope(model, 'layer')"
        )
