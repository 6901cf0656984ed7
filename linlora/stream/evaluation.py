"""One function F in training and in evaluation, where a network has torch.no_grad() blocks of its own.

What a network computes in such a block is a constant to F, as it is to the gradient. In training the grad mode tells
where a block is. In evaluation all is under the caller's no_grad, and a block within would not be seen. So while
a network runs, the grad mode is on and only its own blocks switch it off; that nothing is to be recorded is noted here,
and its adapters and its output have no graph.
"""

from __future__ import annotations

import sys
from threading import local
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Factors = TypeVar("Factors", bound=tuple)


@torch.compiler.disable
def begin(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook of the whole network."""
    calls = _calls()
    # an interrupt may have left others
    _local.entries = [entry for entry in _entries() if any(entry[0] is call for call in calls)]
    recorded = recording() and torch.is_grad_enabled()
    _entries().append((calls[0], module, recorded))
    torch.set_grad_enabled(True)


@torch.compiler.disable
def end(module: nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook of the whole network, also where its forward raised."""
    if not _entries() or _entries()[-1][1] is not module:  # another pre-hook raised
        return output
    _, _, recorded = _entries().pop()
    # under another network's, or the same one's from the PEFT model's call, the block goes on
    torch.set_grad_enabled(recorded or bool(_entries()))
    if recorded or not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
        return output
    return tree_map_only(Tensor, torch.detach, output)


def recording() -> bool:
    """Whether gradients are asked for where the network was called."""
    return _entries()[-1][2] if _entries() else torch.is_grad_enabled()


def unrecorded(factors: Factors) -> Factors:
    """The factors of an adapter, a namedtuple, without their graph where none is asked for."""
    if recording():
        return factors
    return type(factors)(*(x.detach() if isinstance(x, Tensor) else x for x in factors))


def in_block() -> bool:
    """Whether the code that calls this is in a torch.no_grad() block of the network itself."""
    return bool(_entries()) and not torch.is_grad_enabled()


def past_hooks() -> bool:
    """Whether the code that calls this runs without gradients in no call of a network that `begin` knows."""
    return not _entries() and not torch.is_grad_enabled()


_local = local()


def _entries() -> list[tuple[FrameType, nn.Module, bool]]:
    if not hasattr(_local, "entries"):
        _local.entries = []
    return _local.entries


def _calls() -> list[FrameType]:
    """The frames in which PyTorch is calling a module, from the innermost outwards."""
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None:
        if frame.f_code.co_filename == _call_impl.co_filename:
            found.append(frame)
        frame = frame.f_back
    return found


_call_impl = nn.Module._call_impl.__code__
