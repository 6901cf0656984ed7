"""Two streams through modules that FSDP2 has sharded.

`torch.distributed.fsdp.fully_shard` puts hooks before and after a module's forward that follow autograd through its
inputs and outputs, to gather and free the weights in backward. The graph is that of the primal alone, so around those
hooks a DualTensor is taken apart: they see the primal, and its tangent joins it again behind them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from linlora.stream.tensor import DualTensor, duals, rebuilt, relate, replace_duals, wrap


def follow_sharding(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook of the base model: by its first call, `fully_shard` has put its hooks where it wants them."""
    if torch.distributed.is_initialized():
        for block in module.modules():
            if isinstance(block, FSDPModule) and block is not module and not _has_boundary(block):
                Boundary(block)


def forget_sharding(model: nn.Module) -> None:
    """Take every boundary out again."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_boundary(hook)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


class Boundary:
    """The hooks of one module, on both sides of those of FSDP2; between two of a pair, `apart` holds the tangents."""

    def __init__(self, block: nn.Module) -> None:
        self.apart: Any = None
        block.register_forward_pre_hook(self.part_inputs, prepend=True, with_kwargs=True)
        block.register_forward_pre_hook(self.join_inputs, with_kwargs=True)
        block.register_forward_hook(self.part_output, prepend=True)
        block.register_forward_hook(self.join_output)

    def part_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return self._part((args, kwargs))

    def join_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return self._join((args, kwargs))

    def part_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self._part(output)

    def join_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self._join(output)

    def _part(self, tree: Any) -> Any:
        self.apart = tree
        return replace_duals(tree, _own)

    def _join(self, tree: Any) -> Any:
        before, self.apart = self.apart, None
        return _joined(before, tree)


def _own(dual: DualTensor) -> Tensor:
    """The primal. If it is a view, FSDP2 warns that `output += y` would lose its hook; of a DualTensor `+=` never does
    (linlora.stream.in_place), so it gets a tensor of the same memory that is not called one."""
    primal = dual.primal
    return primal if primal._base is None else torch.ops.aten._unsafe_view(primal, primal.shape)


def _joined(before: Any, after: Any) -> Any:
    """`after`, which has the structure of `before`, with the tangents of the DualTensors there."""
    if isinstance(before, DualTensor):
        # the dtype may be another one: a mixed-precision policy casts what passes its hooks
        return relate(before, wrap(after, before.tangent, before.stream))
    if not isinstance(before, (tuple, list, dict)) or next(duals(before), None) is None:
        return after
    if isinstance(before, dict):  # and transformers' ModelOutput, which is one
        for name, child in before.items():
            after[name] = _joined(child, after[name])
        return after
    return rebuilt(after, [_joined(*pair) for pair in zip(before, after, strict=True)])


def _has_boundary(module: nn.Module) -> bool:
    return any(_is_boundary(hook) for hook in module._forward_pre_hooks.values())


def _is_boundary(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), Boundary)
