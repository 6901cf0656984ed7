"""The adapters of one layer: their states, their factors, and PEFT's methods that add and switch them.

An adapter is in one of three states, which decide what is passed to the op:

    plain       A0 = lora_A (trainable)    B0 = none             dB = lora_B                    ordinary LoRA
    short       A0 = lora_A (frozen)       B0 = none             dB = lora_B                    linearized at B0 = 0
    pair        A0 = lora_A (frozen)       B0 = lora_B (frozen)  dA, dB = lora_dA, lora_dB      linearized at B0 != 0

PEFT starts at B0 = 0, where dA has no effect: the op is short of a term, and B alone trains. Elsewhere there are a pair
of point factors and a pair of changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn

from linlora.kernels.problem import Factors
from linlora.layers.calls import PATCHED, beyond_product, hooks_of_all_modules, is_product, pefts_forward_is_its_own
from linlora.layers.peft_names import DELTAS, ChangesOfB
from linlora.layers.restoring import restoring
from linlora.layers.vanilla import not_vanilla_layer
from linlora.layers.weights import Fold
from linlora.ops.checks import autocast_enabled
from linlora.storage.tensors import finite
from linlora.stream import Stream

State = Literal["plain", "short", "pair"]


class LoraAdapters(PeftLoraLinear):
    """A PEFT LoRA linear layer whose adapters may be linearized. `ConvertedLoraLinear` is the whole layer.

    Attributes:
        layer_name: its name in the base model.
        states: the state of each adapter.
        stream: at model scope, the stream of the model; None otherwise.
        mixed: whether the last call had rows of its own, which may be lost in backward.
        folds: the merges since the last unmerge.
    """

    adapter_layer_names = (*PeftLoraLinear.adapter_layer_names, "lora_dA", "lora_dB")
    other_param_names = (*PeftLoraLinear.other_param_names, "states")  # what PEFT clears when it deletes an adapter

    layer_name: str
    states: dict[str, State]
    stream: Stream | None
    mixed: bool = False
    folds: list[Fold]
    lora_A: Any  # PEFT's ModuleDicts of nn.Linear by adapter
    lora_B: Any
    lora_dA: nn.ParameterDict
    of_lora_B: ChangesOfB
    base_layer: Any

    @property
    def lora_dB(self) -> nn.ParameterDict:
        return self.of_lora_B.lora_dB

    @property
    def linearized(self) -> list[str]:
        """The adapters that are linearized."""
        return [name for name, state in self.states.items() if state != "plain"]

    @property
    def pairs(self) -> list[str]:
        """The adapters that are linearized at B0 != 0."""
        return [name for name, state in self.states.items() if state == "pair"]

    @property
    def matrix(self) -> Tensor:
        """The base weight as (N, K), however it is stored."""
        return self.base_layer.weight.t() if self.fan_in_fan_out else self.base_layer.weight

    def factors(self, adapter: str) -> Factors:
        """The factors of one adapter. Those of the linearization point take no gradient: nothing may move the point."""
        A, B, state = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.states[adapter]
        if state != "plain" and A.requires_grad:
            A = A.detach()
        if state != "pair":
            return Factors(A, None, None, B, self.scaling[adapter])
        if B.requires_grad:
            B = B.detach()
        dA = self.lora_dA[adapter]
        if dA.shape != A.shape:
            raise ValueError(
                f"layer '{self.layer_name}': lora_A of adapter '{adapter}' was replaced by one of {tuple(A.shape)} "
                f"(hotswap_adapter does that), its dA is {tuple(dA.shape)}; linearize after the adapter is in place"
            )
        return Factors(A, B, dA, self.lora_dB[adapter], self.scaling[adapter])

    def _stacked(self, adapters: list[str]) -> Factors:
        """Several active adapters as one of the summed rank: their factors side by side, each scaled by its own."""
        parts = [self.factors(name) for name in adapters]
        A0 = torch.cat([part.A0 for part in parts])
        dB = torch.cat([part.scaling * part.dB for part in parts], dim=1)
        if all(part.B0 is None for part in parts):
            return Factors(A0, None, None, dB, 1.0)
        dA = torch.cat([torch.zeros_like(part.A0) if part.dA is None else part.dA for part in parts])
        B0 = torch.cat(
            [torch.zeros_like(part.dB) if part.B0 is None else part.scaling * part.B0 for part in parts], dim=1
        )
        return Factors(A0, B0, dA, dB, 1.0)

    def is_finite(self, adapter: str) -> bool:
        """Whether no factor of an adapter holds NaN or infinity."""
        return all(finite(factor) for factor in self.factors(adapter)[:4] if factor is not None)

    def dropouts(self, adapters: Sequence[str]) -> set[float]:
        """Every dropout that one of these adapters has now."""
        modules = self._modules["lora_dropout"]._modules
        return {vars(modules[name]).get("p", 0.0) if modules[name].training else 0.0 for name in adapters}

    def _dropout_p(self, adapters: list[str]) -> float:
        """The one dropout of some adapters: 0 where their modules, as PEFT asks them, are not in training mode."""
        ps = self.dropouts(adapters)
        if len(ps) > 1:
            raise ValueError(
                f"layer '{self.layer_name}': the active adapters {adapters} have different dropouts {sorted(ps)}; "
                "give them one dropout, or train one at a time with model.set_adapter(name)"
            )
        return ps.pop()

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add a plain adapter, or make one anew, as PEFT asks.

        Raises ValueError, and adds nothing, where it is not vanilla LoRA, or an adapter of that name is linearized.
        """
        if adapter_name in self.linearized:
            raise ValueError(
                f"layer '{self.layer_name}': adapter '{adapter_name}' is linearized, and would be made anew as a plain "
                "one (initialize_lora_eva_weights does that where it changes ranks, inject_adapter with a name that is "
                "taken); delete the adapter, or linlora.delinearize the model, first"
            )
        with restoring(self):
            super().update_layer(adapter_name, *args, **kwargs)
            if (why := not_vanilla_layer(self, [adapter_name])) is not None:
                raise ValueError(
                    f"layer '{self.layer_name}': adapter '{adapter_name}' cannot be added to a converted layer: {why}. "
                    "Add it as vanilla LoRA, or linlora.delinearize the model first"
                )
            self.states[adapter_name] = "plain"

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        super().set_adapter(adapter_names, *args, **kwargs)
        self._freeze_point()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_point()

    def _freeze_point(self) -> None:
        """Let the point of every linearized adapter take no gradient, whatever PEFT switched on."""
        for name in self.linearized:
            self.lora_A[name].weight.requires_grad_(False)
        for name in self.pairs:
            self.lora_B[name].weight.requires_grad_(False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take (A', B') of twice the rank apart (linlora.layers.folding): a saved linearized adapter, resumed.

        A plain adapter of its own rank is taken with its function as well, as a point that nothing has moved from yet.
        """
        for key in [key for key in state_dict if key.startswith(f"{prefix}lora_dB.")]:  # where dB lay in linlora 0.1
            state_dict[f"{prefix}of_lora_B.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        for adapter in self.pairs:
            a, b, d_a, d_b = factor_keys(prefix, adapter)
            if a not in state_dict or b not in state_dict or d_a in state_dict:
                continue
            r = self.r[adapter]
            if state_dict[a].shape[0] == 2 * r:
                A0, dA = (part.clone() for part in state_dict[a].split(r))  # with assign=True they are the parameters
                B, B0 = (part.contiguous() for part in state_dict[b].split(r, dim=1))
                state_dict.update({a: A0, b: B0, d_a: dA, d_b: B - B0})
            elif state_dict[a].shape[0] == r:
                state_dict.update({d_a: torch.zeros_like(state_dict[a]), d_b: torch.zeros_like(state_dict[b])})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {state}" for name, state in self.states.items())

    def why_called(self, adapters: Sequence[str]) -> str | None:
        """Why the LoRA parts of some adapters are called; None where the op reads their weights. See `calls`."""
        if hooks_of_all_modules():
            return "hooks of all modules are for its parts too"
        if not pefts_forward_is_its_own():
            return PATCHED
        for kind in ("lora_A", "lora_B", "lora_dropout"):
            parts = self._modules[kind]._modules
            for name in adapters:
                if not is_product(parts[name]):
                    return f"{kind}['{name}'] {beyond_product(parts[name])}"
        return None

    def warn_of_calls(self, why: str) -> None:
        warnings.warn(f"layer '{self.layer_name}': {why}, so all of them are called, not run as one op", stacklevel=3)

    def _refuse_patched(self, adapters: Sequence[str]) -> None:
        if not pefts_forward_is_its_own():
            raise ValueError(f"layer '{self.layer_name}': {PATCHED}, and adapters {list(adapters)} are linearized")

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Refuse a forward of PEFT that was kept from before the layer was linearized and calls this."""
        super()._check_forward_args(x, *args, **kwargs)
        if not (self._disable_adapters or self.merged_adapters):
            adapters = kwargs.get("adapter_names") or self.active_adapters
            if linearized := sorted({*adapters} & {*self.linearized}):
                raise ValueError(
                    f"layer '{self.layer_name}': PEFT's own forward is called, which does not know {linearized}, "
                    "linearized by linlora; call the layer, or linlora.delinearize(model)"
                )


def check_input(layer: str, x: Tensor, weight: Tensor) -> None:
    """Raise a ValueError, with the remedy, where x (..., K) does not fit the weight (N, K) of a layer of some name."""
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"layer '{layer}': the input {tuple(x.shape)} has {x.shape[-1]} features in its last dimension, the layer "
            f"takes {weight.shape[1]}"
        )
    if x.device != weight.device:
        raise ValueError(f"layer '{layer}': the input is on {x.device}, the layer on {weight.device}; move one of them")
    if x.dtype != weight.dtype and not autocast_enabled(x):
        raise ValueError(
            f"layer '{layer}': the input is {x.dtype}, the layer {weight.dtype}; cast the input or the model, or run "
            "under torch.autocast"
        )


def factor_keys(prefix: str, adapter: str) -> list[str]:
    """The keys of A, B, dA and dB in a state dict, behind the prefix of their layer."""
    return [f"{prefix}lora_{kind}.{adapter}.weight" for kind in "AB"] + [f"{prefix}{it}.{adapter}" for it in DELTAS]
