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

from linlora.ops.transforms import transform_active
from linlora.stream.caller import function_name, module_name, remedy, where
from linlora.stream.tensor import (
    DualTensor,
    TangentError,
    differentiable,
    duals,
    primals,
    relate,
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
    """Run a function twice: as it is, for the primal, and in forward mode, for the tangent.

    Side effects happen in the first run. The second repeats its random numbers, on copies of what it would write.
    """
    flat, structure = tree_flatten((args, kwargs))
    first = next(duals(flat))
    otherwise = first.stream.otherwise
    if transform_active():
        raise TangentError(
            f"{where(func)}: torch.func or forward-mode AD inside of a network that carries tangents; nest the "
            "transforms of torch.func alone"
        )
    if _is_custom(func):
        raise TangentError(
            f"{where(func)}: a custom operator, for which PyTorch's forward mode may return zero tangents silently; "
            f"replace it by torch functions, {remedy(otherwise)}"
        )
    if function_name(func).endswith("_") and not function_name(func).startswith("__"):
        raise TangentError(
            f"{where(func)}: changes a tensor in place, in a way the tangent cannot follow; {remedy(otherwise)}"
        )
    before = [leaf.clone() if _is_statistic(func, leaf) else leaf for leaf in flat]
    versions, random = _versions(flat), Randomness(flat)
    with sdpa_kernel(SDPBackend.MATH):  # in both passes: another implementation would drop other elements
        y = func(*primals(args), **primals(kwargs))
        if _versions(flat) != versions and all(a is b for a, b in zip(flat, before, strict=True)):
            raise TangentError(
                f"{where(func)}: writes one of its arguments, which its second pass, for the tangent, would do again; "
                f"replace it by functions that return their result, {remedy(otherwise)}"
            )
        leaves, shape = tree_flatten(y)
        if not any(differentiable(leaf) for leaf in leaves):
            return y
        with _counted(func, first), random.repeated():
            tangents = _tangents(func, before, structure, otherwise)
    results = [wrap(leaf, tangent, first.stream) for leaf, tangent in zip(leaves, tangents, strict=True)]
    for dual in duals(flat):
        relate(dual, results)
    return tree_unflatten(results, shape)


DualTensor.rules[None] = forward_mode


def _tangents(func: Any, flat: list[Any], structure: Any, otherwise: str) -> list[Tensor | None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # in which forward mode has no tangents
        stack.enter_context(torch.no_grad())
        stack.enter_context(forward_ad.dual_level())
        if function_name(func) in _RECURRENT:  # whose implementations by other libraries have no forward mode
            libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
            for library in libraries:
                stack.callback(setattr, library, "enabled", library.enabled)
                library.enabled = False
        args, kwargs = tree_unflatten([_dual(leaf) for leaf in flat], structure)
        try:
            y = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            raise TangentError(
                f"{where(func)}: PyTorch cannot differentiate it in forward mode ({error}); replace it by other torch "
                f"functions, {remedy(otherwise)}"
            ) from error
        return [forward_ad.unpack_dual(leaf).tangent if differentiable(leaf) else None for leaf in tree_flatten(y)[0]]


_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def _dual(leaf: Any) -> Any:
    return forward_ad.make_dual(_normal(leaf.primal), _normal(leaf.tangent)) if isinstance(leaf, DualTensor) else leaf


def _normal(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x.detach()


_STATISTICS = {
    "batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_impl_index",
    "cudnn_batch_norm", "miopen_batch_norm",
}  # fmt: skip


def _is_statistic(func: Any, leaf: Any) -> bool:
    """Whether an argument is one that normalizations update, which autograd's version counters do not always show."""
    known = function_name(func).removeprefix("aten::") in _STATISTICS
    return known and type(leaf) is not DualTensor and differentiable(leaf) and not leaf.requires_grad


def _versions(flat: list[Any]) -> list[int]:
    """Autograd's count of the writes into each tensor."""
    tensors = [primals(leaf) for leaf in flat if isinstance(leaf, Tensor)]
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


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


class Randomness:
    """The states of the random generators that a call may use: the default ones, and those among its arguments."""

    def __init__(self, flat: list[Any]) -> None:
        devices = {primals(leaf).device for leaf in flat if isinstance(leaf, Tensor)}
        self.generators = [torch.default_generator, *(leaf for leaf in flat if isinstance(leaf, torch.Generator))]
        for device in (device for device in devices if device.type in ("cuda", "xpu")):
            module = torch.get_device_module(device)
            self.generators.append(module.default_generators[device.index or 0])
        self.states = self._read()

    def _read(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def _write(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Inside, random functions repeat what they drew since this was made; afterwards they go on from now."""
        now = self._read()
        self._write(self.states)
        try:
            yield
        finally:
            self._write(now)
