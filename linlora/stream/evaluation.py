"""One function F in training and in evaluation, where a network has torch.no_grad() blocks of its own.

What a network computes in such a block is a constant to F, as it is to the gradient. In training the grad mode tells
where a block is. In evaluation all is under the caller's no_grad, and a block within would not be seen. So while
a network runs, the grad mode is on and only its own blocks switch it off; that nothing is to be recorded is noted here,
and its adapters and its output have no graph.
"""

from __future__ import annotations

from threading import local
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from linlora.stream.caller import stack

Factors = TypeVar("Factors", bound=tuple)


@torch.compiler.disable
def begin(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook of the whole network."""
    calls = [frame for frame in stack() if frame.f_code.co_filename == _CALLER]
    # an interrupt may have left others
    _running.networks = [network for network in _running.networks if any(network[0] is call for call in calls)]
    recorded = recording() and torch.is_grad_enabled()
    _running.networks.append((calls[0], module, recorded))
    torch.set_grad_enabled(True)


@torch.compiler.disable
def end(module: nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook of the whole network, also where its forward raised."""
    if not _running.networks or _running.networks[-1][1] is not module:  # another pre-hook raised
        return output
    _, _, recorded = _running.networks.pop()
    # under another network's, or the same one's from the PEFT model's call, the block goes on
    torch.set_grad_enabled(recorded or bool(_running.networks))
    if recorded or not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
        return output
    return tree_map_only(Tensor, torch.detach, output)


def recording() -> bool:
    """Whether gradients are asked for where the network was called."""
    return _running.networks[-1][2] if _running.networks else torch.is_grad_enabled()


def unrecorded(factors: Factors) -> Factors:
    """The factors of an adapter, a namedtuple, without their graph where none is asked for."""
    if recording():
        return factors
    return type(factors)(*(x.detach() if isinstance(x, Tensor) else x for x in factors))


def in_block() -> bool:
    """Whether the code that calls this is in a torch.no_grad() block of the network itself."""
    return bool(_running.networks) and not torch.is_grad_enabled()


def past_hooks() -> bool:
    """Whether the code that calls this runs without gradients in no call of a network that `begin` knows."""
    return not _running.networks and not torch.is_grad_enabled()


class _Running(local):
    """The networks that run in a thread, the innermost last: the frame that calls each, and whether it is recorded."""

    def __init__(self) -> None:
        self.networks: list[tuple[FrameType, nn.Module, bool]] = []


_running = _Running()
_CALLER = nn.Module._call_impl.__code__.co_filename
"""The file of PyTorch that calls modules."""
