"""Every function without a rule: the primal as it is, the tangent by forward-mode AD of that one function.

Right for whatever PyTorch can differentiate forward, at the price of computing the primal twice; so each is counted,
with its module and the time the tangent took, and shows in the report that `linearize` returned.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from linlora.stream.tensor import (
    DualTensor,
    TangentError,
    differentiable,
    duals,
    function_name,
    module_name,
    primals,
    relate,
    where,
    wrap,
)


@dataclass
class Fallback:
    """A function that ran in forward mode: where, how often, and what its tangents cost in all."""

    module: str
    function: str
    calls: int = 0
    host_seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    @property
    def seconds(self) -> float:
        """On a GPU, the time between the events around the calls; this waits for them."""
        while self.events:
            start, end = self.events.pop()
            end.synchronize()
            self.host_seconds += start.elapsed_time(end) / 1e3
        return self.host_seconds

    def __str__(self) -> str:
        return f"{self.function} in '{self.module}': {self.calls} calls, {1e3 * self.seconds:.1f} ms"


def forward_mode(func: Any, args: tuple, kwargs: dict) -> Any:
    if _is_custom(func):
        raise TangentError(
            f"{where(func)}: a custom operator, for which PyTorch's forward mode may return zero tangents silently; "
            "replace it by torch functions, or use scope='layer'"
        )
    flat, structure = tree_flatten((args, kwargs))
    first = next(duals(flat))
    random = _random_states(first.device)
    y = func(*primals(args), **primals(kwargs))
    leaves, shape = tree_flatten(y)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return y
    if not any(differentiable(leaf) for leaf in leaves):
        return wrap(y, None, first.stream)
    with _counted(func, first), _replayed(random, first.device):
        tangents = _tangents(func, flat, structure)
    results = [
        wrap(leaf, tangent, first.stream) if isinstance(leaf, Tensor) else leaf
        for leaf, tangent in zip(leaves, tangents, strict=True)
    ]
    return tree_unflatten(relate(first, results), shape)


DualTensor.rules[None] = forward_mode


def _tangents(func: Any, flat: list[Any], structure: Any) -> list[Tensor | None]:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(forward_ad.dual_level())
        args, kwargs = tree_unflatten([_dual(leaf) for leaf in flat], structure)
        try:
            y = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            raise TangentError(
                f"{where(func)}: PyTorch cannot differentiate it in forward mode ({error}); replace it by other torch "
                "functions, or use scope='layer'"
            ) from error
        return [forward_ad.unpack_dual(leaf).tangent if differentiable(leaf) else None for leaf in tree_flatten(y)[0]]


def _dual(leaf: Any) -> Any:
    if not isinstance(leaf, DualTensor):
        return leaf
    return leaf.primal if leaf.tangent is None else forward_ad.make_dual(leaf.primal.detach(), leaf.tangent)


def _is_custom(func: Any) -> bool:
    """An operator of somebody's library, or a higher-order one, called as torch.ops.namespace.name."""
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return function_name(func).split("::")[0] not in ("aten", "prims")
    return isinstance(func, torch._ops.HigherOrderOperator)


@contextmanager
def _counted(func: Any, dual: DualTensor) -> Iterator[None]:
    key = module_name(), function_name(func)
    entry = dual.stream.fallbacks.setdefault(key, Fallback(*key))
    entry.calls += 1
    if dual.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        entry.events.append((start, end))
    else:
        started = time.perf_counter()
        yield
        entry.host_seconds += time.perf_counter() - started


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, random functions repeat what they drew after `states` was taken; afterwards they go on from now."""
    now = _random_states(device)
    _set_random_states(states, device)
    try:
        yield
    finally:
        _set_random_states(now, device)


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
