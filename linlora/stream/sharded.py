"""Two streams through modules that FSDP2 has sharded, and through DDP.

`torch.distributed.fsdp.fully_shard` puts hooks before and after a module's forward that follow autograd through its
inputs and outputs, to gather and free the weights in backward. The graph is that of the primal alone, so around those
hooks a DualTensor is taken apart: they see the primal, and its tangent joins it again behind them. So it is around what
DDP does with the inputs and outputs of the network: with find_unused_parameters it looks for their graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from linlora.stream.tensor import DualTensor, duals, rebuilt, relate, replace_duals, wrap


def follow_sharding(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook of the base model: by its first call, `fully_shard` has put its hooks where it wants them."""
    if torch.distributed.is_initialized():
        for block in module.modules():
            if isinstance(block, FSDPModule) and block is not module and _boundary(block) is None:
                Boundary(block)


@contextmanager
def through_wrappers(modules: list[nn.Module]) -> Iterator[None]:
    """Lead the streams through the modules of a network that DDP and FSDP2 wrap, for the time of a call.

    The boundaries of FSDP2 stay, because a checkpoint runs its modules again in backward.
    """
    wrapped = [Boundary(module, module.module) for module in modules if isinstance(module, DistributedDataParallel)]
    sharded = [_boundary(block) or Boundary(block) for block in modules if isinstance(block, FSDPModule)]
    try:
        yield
    finally:
        for boundary in wrapped:
            boundary.remove()
        for boundary in sharded:  # where the network raised
            boundary.apart = None


class Boundary:
    """The hooks on both sides of somebody else's code; between two of a pair, `apart` holds the tangents.

    That code is the hooks of FSDP2 on one module, or what `outer`, a wrapper such as DDP, does around `inner`.
    """

    def __init__(self, outer: nn.Module, inner: nn.Module | None = None) -> None:
        inner = outer if inner is None else inner
        self.apart: Any = None
        self.handles = [
            outer.register_forward_pre_hook(self.part_inputs, prepend=True, with_kwargs=True),
            inner.register_forward_pre_hook(self.join_inputs, with_kwargs=True),
            inner.register_forward_hook(self.part_output, prepend=True),
            outer.register_forward_hook(self.join_output),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

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


def _boundary(module: nn.Module) -> Boundary | None:
    hooks: Any = module._forward_pre_hooks.values()
    return next((hook.__self__ for hook in hooks if is_boundary(hook)), None)


def is_boundary(hook: Any) -> bool:
    """Whether a hook is one of a `Boundary`."""
    return isinstance(getattr(hook, "__self__", None), Boundary)
