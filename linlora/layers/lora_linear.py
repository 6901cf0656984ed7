"""The layer: a PEFT LoRA linear layer whose forward is one linlora op.

`FusedLoraLinear` *is* a `peft.tuners.lora.Linear`: a layer becomes one by a change of its class, so no parameter is
moved, renamed or copied, and adapters are switched, saved and merged by PEFT's own code. For each adapter it is in one
of three states, which decide what is passed to the op:

    plain       A0 = lora_A (trainable)    B0 = none            dB = lora_B       ordinary LoRA
    short       A0 = lora_A (frozen)       B0 = none            dB = lora_B       linearized at B0 = 0
    pair        A0 = lora_A (frozen)       B0 = lora_B (frozen)  dA, dB = lora_dA, lora_dB

The op reads the weights of the layer's parts. Where PEFT's calls of the parts do more (linlora.layers.calls), the base
layer is called and the update added, or all parts are (linlora.layers.called), both with a warning.

At layer scope the layer returns primal + tangent. At model scope, where it has a `stream`, it returns both as a
DualTensor (linlora.stream).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from linlora.layers.called import called_update
from linlora.layers.calls import PATCHED, beyond_product, hooks_of_all_modules, is_product, pefts_forward_is_its_own
from linlora.layers.mixed_batches import mixed_batch
from linlora.layers.mixtures import Rows
from linlora.layers.peft_names import ChangesOfB
from linlora.layers.restoring import restoring
from linlora.layers.sharding import check_there
from linlora.layers.vanilla import not_vanilla_layer
from linlora.layers.weights import Fold, Update, check_sum, fold_keeping, stacked, unfold
from linlora.layers.weights import fold as fold_into
from linlora.ops import dual
from linlora.ops.checks import autocast_enabled, autocast_input
from linlora.ops.dual.low_rank_update import low_rank_update as dual_low_rank_update
from linlora.ops.linearized_lora_linear import unchecked
from linlora.ops.low_rank_update import low_rank_update
from linlora.storage.tensor_files import finite
from linlora.stream import DualTensor, Stream
from linlora.stream.evaluation import recording, unrecorded
from linlora.stream.tensor import refuse_inside_function

State = Literal["plain", "short", "pair"]
LORA_PARTS = ("lora_A", "lora_B", "lora_dropout")
"""What PEFT's forward calls beside the base layer: ModuleDicts by adapter."""


class Factors(NamedTuple):
    """What the op takes of one adapter."""

    A0: Tensor
    B0: Tensor | None
    dA: Tensor | None
    dB: Tensor
    scaling: float


class FusedLoraLinear(PeftLoraLinear):
    """A PEFT LoRA linear layer, plain or linearized, that runs on the fused op. Made by `linlora.layers.conversion`."""

    adapter_layer_names = (*PeftLoraLinear.adapter_layer_names, "lora_dA", "lora_dB")
    other_param_names = (*PeftLoraLinear.other_param_names, "states")  # what PEFT clears when it deletes an adapter

    layer_name: str
    states: dict[str, State]
    stream: Stream | None
    mixed: bool = False  # whether the last call had rows of its own, which may be lost in backward
    folds: list[Fold]  # of the merges since the last unmerge
    lora_A: Any  # PEFT's ModuleDicts of nn.Linear by adapter
    lora_B: Any
    lora_dA: nn.ParameterDict
    of_lora_B: ChangesOfB
    base_layer: Any

    @property
    def lora_dB(self) -> nn.ParameterDict:
        return self.of_lora_B.lora_dB

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters or self.merged_adapters or args or kwargs:
            return self._base_forward(x, *args, **kwargs)
        if self.mixed:
            self._end_of_mixed()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return self.base_layer(x)
        if self.stream is not None:
            return self._both_streams(x, active)
        if self._more_than_factors(active):
            return self._called(x, active)
        factors = self.factors(active[0]) if len(active) == 1 else self._stacked(active)
        p = self._dropout_p(active)
        if p == 1.0:
            return self._called(x, active)
        return self._one_stream(x, factors, p, torch.randint(2**31, (), device=x.device) if p > 0.0 else None)

    def _more_than_factors(self, adapters: Sequence[str]) -> bool:
        """Whether a call of a LoRA part of some adapters does more than what the op computes from its weight."""
        if hooks_of_all_modules() or not pefts_forward_is_its_own():
            return True
        A, B, dropout = (self._modules[kind]._modules for kind in LORA_PARTS)
        return not all(is_product(A[name]) and is_product(B[name]) and is_product(dropout[name]) for name in adapters)

    def _called(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """Every part called: by PEFT's own forward, and where an adapter is linearized by `called_update`."""
        self._warn_of_calls(adapters)
        if all(self.states.get(name, "plain") == "plain" for name in adapters):
            return super().forward(x)
        self._refuse_patched(adapters)
        y = self.base_layer(x)
        return y + sum(called_update(self, adapters, x)).to(y.dtype)

    def _refuse_patched(self, adapters: Sequence[str]) -> None:
        if not pefts_forward_is_its_own():
            raise ValueError(f"layer '{self.layer_name}': {PATCHED}, and adapters {list(adapters)} are linearized")

    def _warn_of_calls(self, adapters: Sequence[str]) -> None:
        why = called_parts(self, adapters)
        if why is None and hooks_of_all_modules():
            why = "hooks of all modules are for its parts too"
        elif why is None and not pefts_forward_is_its_own():
            why = PATCHED
        elif why is None:
            why = f"its base layer {beyond_product(self.base_layer)}"
        warnings.warn(f"layer '{self.layer_name}': {why}, so all of them are called, not fused", stacklevel=3)

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Asked by PEFT's forward. One kept from before the layer was linearized may call it, and is refused."""
        super()._check_forward_args(x, *args, **kwargs)
        if not (self._disable_adapters or self.merged_adapters):
            adapters = kwargs.get("adapter_names") or self.active_adapters
            linearized = sorted({name for name in adapters if self.states.get(name, "plain") != "plain"})
            if linearized:
                raise ValueError(
                    f"layer '{self.layer_name}': PEFT's own forward is called, which does not know {linearized}, "
                    "linearized by linlora; call the layer, or linlora.delinearize(model)"
                )

    def _one_stream(self, x: Tensor, factors: Factors, p: float, seed: Tensor | None) -> Tensor:
        """Layer scope, and plain LoRA: primal + tangent."""
        if not is_product(self.base_layer):
            self._warn_of_base()
            return low_rank_update(self.base_layer(x), autocast_input(x), *factors, p, seed)
        weight = self.matrix
        x = autocast_input(x)
        if x.shape[-1] != weight.shape[1] or x.device != weight.device or x.dtype != weight.dtype:
            self._check_input(x, weight)
        return unchecked(x, weight, self.base_layer.bias, *factors, p, seed)

    @property
    def matrix(self) -> Tensor:
        """The base weight as (N, K), however it is stored."""
        return self.base_layer.weight.t() if self.fan_in_fan_out else self.base_layer.weight

    @torch.compiler.disable
    def _both_streams(self, x: Tensor, active: list[str]) -> Tensor:
        """Model scope: the primal at (A0, B0) and the tangent in (dA, dB) and in the stream so far."""
        if not torch.is_grad_enabled():
            refuse_inside_function(f"layer '{self.layer_name}'")
        if torch.jit.is_tracing():
            raise ValueError(
                f"layer '{self.layer_name}': torch.jit.trace does not see the tangent of a model linearized at model "
                "scope; trace the layer-scope function (linlora.set_scope(model, 'layer')), or linlora.delinearize"
            )
        plain = [name for name in active if self.states.get(name, "plain") == "plain"]
        if plain:
            raise ValueError(
                f"layer '{self.layer_name}': adapter {plain} is not linearized, the model is (model scope); activate a "
                "linearized adapter, or delinearize the model and linearize it again with all its adapters"
            )
        assert self.stream is not None
        x, x_tangent = self.stream.enter(x)
        if recording() and any(parameter.requires_grad for parameter in self.base_layer.parameters()):
            raise ValueError(
                f"layer '{self.layer_name}': its base weight asks for a gradient, but model scope linearizes in the "
                "adapter alone; freeze it with requires_grad_(False)"
            )
        factors = unrecorded(self.factors(active[0]) if len(active) == 1 else self._stacked(active))
        p = self._dropout_p(active)
        seed = torch.randint(2**31, (), device=x.device) if p > 0.0 else None
        if self._more_than_factors(active) or p == 1.0:
            return self.stream.leave(*self._called_streams(x, x_tangent, active))
        return self.stream.leave(*self._two_streams(x, x_tangent, factors, p, seed))

    def _called_streams(self, x: Tensor, x_tangent: Tensor | None, adapters: list[str]) -> tuple[Tensor, Tensor]:
        self._refuse_patched(adapters)
        self._warn_of_calls(adapters)
        y, y_tangent = self._base_streams(x, x_tangent)
        update, tangent = (of.to(y.dtype) for of in called_update(self, adapters, x, x_tangent, two=True))
        return y + update, tangent if y_tangent is None else y_tangent + tangent

    def _base_streams(self, x: Tensor, x_tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The base layer called, on both streams."""
        assert self.stream is not None
        y = self.base_layer(x if x_tangent is None else DualTensor(x, x_tangent, self.stream))
        return (y.primal, y.tangent) if isinstance(y, DualTensor) else (y, None)

    def _two_streams(
        self, x: Tensor, x_tangent: Tensor | None, factors: Factors, p: float, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if is_product(self.base_layer):
            self._check_input(autocast_input(x), self.matrix)
            return dual.lora_linear(x, x_tangent, self.matrix, self.base_layer.bias, *factors, p, seed)
        self._warn_of_base()
        y, y_tangent = self._base_streams(x, x_tangent)
        x_tangent = None if x_tangent is None else autocast_input(x_tangent)
        return dual_low_rank_update(y, y_tangent, autocast_input(x), x_tangent, *factors, p, seed)

    def _warn_of_base(self) -> None:
        """Where calling the base layer is more than the fused product, which reads its weight."""
        warnings.warn(
            f"layer '{self.layer_name}': its base layer {beyond_product(self.base_layer)}, so it is called and the "
            "update added, not fused",
            stacklevel=3,
        )

    def factors(self, adapter: str) -> Factors:
        """The factors of one adapter. Those of the linearization point take no gradient: nothing may move the point."""
        A, B, state = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.states.get(adapter, "plain")
        if state == "plain":
            return Factors(A, None, None, B, self.scaling[adapter])
        if A.requires_grad:
            A = A.detach()
        if state == "short":
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

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter in fp32 (or wider), in the layout of the base weight; PEFT's name for it."""
        update = self._update([adapter])
        return update.left @ update.right

    def is_finite(self, adapter: str) -> bool:
        """Whether no factor of an adapter holds NaN or infinity."""
        return all(finite(factor) for factor in self.factors(adapter)[:4] if factor is not None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight: their ΔW are summed with it in fp32 and rounded once.

        What rounding loses is kept, so that `unmerge` restores the bits of the weight.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        weight = self.get_base_layer().weight.data
        fold = fold_keeping(weight, self.update_that_fits(names))
        if safe_merge and not finite(weight):
            unfold(weight, fold)
            raise ValueError(
                f"layer '{self.layer_name}': merging {names} gives NaN or infinity; the weight is unchanged"
            )
        self.folds.append(fold)
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
            fold_into(base.weight.data, self.update_that_fits(names))
        return base

    def update_that_fits(self, adapters: list[str]) -> Update:
        """The sum of the ΔW of some adapters, to be folded. Raises ValueError where the weight would not hold it."""
        base = self.get_base_layer()
        if "weight" not in base._parameters:
            raise ValueError(
                f"layer '{self.layer_name}': the weight of its base layer is computed on every call (a "
                "parametrization, weight_norm, pruning), so ΔW would be lost; make it a parameter first "
                "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove)"
            )
        check_there(f"layer '{self.layer_name}'", [("the weight of its base layer", base.weight)])
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
        parts = [stacked(*self.factors(name), like=weight) for name in adapters]
        A, B = torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1)
        return Update(A, B, self.fan_in_fan_out)

    def _no_weight(self) -> str:
        return (
            f"layer '{self.layer_name}': a model linearized at model scope does not fold into weights, because its "
            "tangent runs through the whole network; serve it with both streams, or give up the exact function: "
            "linlora.set_scope(model, 'layer')"
        )

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, to add an adapter: a plain one. Raises ValueError, and adds nothing, where it is not vanilla LoRA."""
        with restoring(self):
            super().update_layer(adapter_name, *args, **kwargs)
            if (why := not_vanilla_layer(self, [adapter_name])) is not None:
                raise ValueError(
                    f"layer '{self.layer_name}': adapter '{adapter_name}' cannot be added to a fused layer: {why}. Add "
                    "it as vanilla LoRA, or linlora.delinearize the model first"
                )
            for of_name in (self.states, self.lora_dA, self.lora_dB):  # of one that had this name
                if adapter_name in of_name:
                    del of_name[adapter_name]

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        super().set_adapter(adapter_names, *args, **kwargs)
        self._freeze_point()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_point()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {state}" for name, state in self.states.items())

    def _freeze_point(self) -> None:
        """The linearization point of every linearized adapter takes no gradient, whatever PEFT switched on."""
        for name, state in self.states.items():
            if state != "plain":
                self.lora_A[name].weight.requires_grad_(False)
            if state == "pair":
                self.lora_B[name].weight.requires_grad_(False)

    def _base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The calls that PEFT's own forward answers, and `adapter_names`."""
        if kwargs.get("adapter_names") is not None:
            kwargs["adapter_names"] = Rows.of(kwargs["adapter_names"])
        rows = kwargs.get("adapter_names")
        if self._disable_adapters or (self.merged_adapters and rows is None):
            return super().forward(x, *args, **kwargs)
        if rows is None or args or len(kwargs) > 1:
            raise ValueError(f"layer '{self.layer_name}': unexpected arguments {args or list(kwargs)} beside the input")
        PeftLoraLinear._check_forward_args(self, x, **kwargs)
        if not pefts_forward_is_its_own():
            raise ValueError(f"layer '{self.layer_name}': {PATCHED}, which is not run with adapter_names")
        return self._by_rows(x, rows)

    def _by_rows(self, x: Tensor, rows: Rows) -> Tensor:
        """The layer with a mixture of adapters for every row."""
        return mixed_batch(self, x, rows)

    def _end_of_mixed(self) -> None:
        """After a call with `adapter_names`, one without. In backward it is one that runs again without the names it
        had, which would give the active adapter gradients of their rows."""
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"layer '{self.layer_name}': the layer is recomputed in backward without the adapter_names it ran "
                "with. Checkpoint with model.gradient_checkpointing_enable(), which keeps them, not with "
                "torch.utils.checkpoint"
            )
        self.mixed = False

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"layer '{self.layer_name}': the input {tuple(x.shape)} has {x.shape[-1]} features in its last "
                f"dimension, the layer takes {weight.shape[1]}"
            )
        if x.device != weight.device:
            raise ValueError(
                f"layer '{self.layer_name}': the input is on {x.device}, the layer on {weight.device}; move one of them"
            )
        if x.dtype != weight.dtype and not autocast_enabled(x.device.type):
            raise ValueError(
                f"layer '{self.layer_name}': the input is {x.dtype}, the layer {weight.dtype}; cast the input or the "
                "model, or run under torch.autocast"
            )

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

    def _dropout_p(self, adapters: list[str]) -> float:
        """The one dropout of some adapters: 0 where their modules, as PEFT asks them, are not in training mode."""
        ps = self.dropouts(adapters)
        if len(ps) > 1:
            raise ValueError(
                f"layer '{self.layer_name}': the active adapters {adapters} have different dropouts {sorted(ps)}; "
                "give them one dropout, or train one at a time with model.set_adapter(name)"
            )
        return ps.pop()

    def dropouts(self, adapters: Sequence[str]) -> set[float]:
        """Every dropout that one of these adapters has now."""
        modules = self._modules["lora_dropout"]._modules
        return {vars(modules[name]).get("p", 0.0) if modules[name].training else 0.0 for name in adapters}


def called_parts(layer: Any, adapters: Sequence[str]) -> str | None:
    """Which LoRA part of some adapters is more than its weight, and why; or None. See linlora.layers.calls."""
    for kind in LORA_PARTS:
        for name in adapters:
            if not is_product(part := getattr(layer, kind)[name]):
                return f"{kind}['{name}'] {beyond_product(part)}"
    return None


def fused_layers(model: nn.Module) -> Iterator[tuple[str, FusedLoraLinear]]:
    """Every fused layer of a model with the name it has in the base model."""
    for module in model.modules():
        if isinstance(module, FusedLoraLinear):
            yield module.layer_name, module
