"""Launches that are repeated: what follows from shapes, strides and dtypes is done once, addresses are filled in.

A step launches the same kernels for the same layers over and over. The first launch of a problem goes the whole way:
checks, configuration, arguments, Triton's binder. A later one whose tensors differ in their addresses alone allocates
the results, puts addresses in their places and calls the compiled kernel. That takes 33 instead of 120 us of the host
for the flags kernel in pair form, 24 instead of 85 for that of few rows (CPU time, on the stub driver of the tests).

The places are found by building the launch a second time, from stand-ins on the meta device: an argument that is the
stand-in of a tensor takes the address of that tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .counters import counters
from .launch import Launch, on_device

SCRATCH = ("su", "sc", "parts")
"""Arguments that are new tensors in every launch."""

_MOST = 4096
_kept: dict[tuple, Repeated] = {}


class _Address(NamedTuple):
    """What a tensor descriptor reads of its tensor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class _Place(NamedTuple):
    """Where an argument holds an address: alone, or at the head of a tuple."""

    argument: int
    tensor: int
    rest: tuple | None


class _Described(NamedTuple):
    """A tensor descriptor, and those for the addresses that the tensor has had."""

    argument: int
    tensor: int
    like: TensorDescriptor
    of_address: dict[int, TensorDescriptor]

    def at(self, address: int) -> TensorDescriptor:
        found = self.of_address.get(address)
        if found is None:
            like = self.like
            if len(self.of_address) >= 64:
                self.of_address.clear()
            found = TensorDescriptor(_Address(address, like.base.dtype), like.shape, like.strides, like.block_shape)
            self.of_address[address] = found
        return found


def key(problem: tuple, *options: Any) -> tuple:
    """All that the launch of a problem depends on but the addresses of its tensors."""
    tensors = [
        (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15 == 0) if isinstance(x, Tensor) else x
        for x in problem
    ]
    return torch.get_float32_matmul_precision(), *options, *tensors


def find(of: tuple) -> Repeated | None:
    """The launch that is kept under a key."""
    return _kept.get(of)


def keep(of: tuple, launch: Launch, problem: Any, result: Any, build: Callable[..., Launch]) -> None:
    """Runs a launch, which `build(problem, result, config)` has made, and keeps what it takes to repeat it."""
    compiled = launch.run(problem.x.device)
    is_whole = (problem.bias is None or problem.bias.is_contiguous()) and not isinstance(problem.scaling, Tensor)
    if is_whole and not triton.knobs.runtime.interpret:
        if len(_kept) >= _MOST:
            _kept.clear()
        _kept[of] = Repeated(launch, compiled, problem, result, build)


class Repeated:
    """A launch with places for the addresses of a problem's tensors, its result and its scratch."""

    def __init__(self, launch: Launch, compiled: Any, problem: Any, result: Any, build: Callable[..., Launch]) -> None:
        stand_ins = [type(of)(*[_stand_in(x) for x in of]) for of in (problem, result)]
        tensors = [x for of in stand_ins for x in of if isinstance(x, Tensor)]
        meta = build(*stand_ins, launch.config).arguments
        self.kind, self.config = type(result), launch.config
        self.made = [None if x is None else (tuple(x.shape), x.dtype) for x in result]
        self.runner = compiled[(*launch.grid, 1, 1)[:3]]
        self.arguments, self.places, self.described = [], [], []
        self.counters = self.n_counters = None
        self.scratch: list[tuple[tuple[int, ...], torch.dtype]] = []
        for i, name in enumerate(launch.kernel.arg_names):
            self.arguments.append(launch.arguments[name])
            argument = meta[name]
            head = argument[0] if isinstance(argument, tuple) else argument
            tensor = head.base if isinstance(head, TensorDescriptor) else head
            if name == "p_counters" and tensor is not None:
                self.counters, self.n_counters = i, tensor.numel()
                self.arguments[i] = None  # keeps no tensor of this launch: it may lie in the memory of a graph
            elif isinstance(tensor, Tensor):
                if name in SCRATCH:
                    self.scratch.append((tuple(tensor.shape), tensor.dtype))
                    tensors.append(tensor)
                (of,) = [j for j, x in enumerate(tensors) if x is tensor]
                if isinstance(head, TensorDescriptor):
                    self.described.append(_Described(i, of, head, {}))
                else:
                    self.places.append(_Place(i, of, argument[1:] if isinstance(argument, tuple) else None))
                self.arguments[i] = None

    def run(self, problem: Any) -> Any:
        """The result of a problem that has the key of this launch."""
        x = problem.x
        made = [None if of is None else x.new_empty(of[0], dtype=of[1]) for of in self.made]
        addresses = [t.data_ptr() for of in (problem, made) for t in of if isinstance(t, Tensor)]
        scratch = [x.new_empty(shape, dtype=dtype) for shape, dtype in self.scratch]
        addresses += [t.data_ptr() for t in scratch]
        arguments = self.arguments.copy()
        for i, of, rest in self.places:
            arguments[i] = addresses[of] if rest is None else (addresses[of], *rest)
        for described in self.described:
            arguments[described.argument] = described.at(addresses[described.tensor])
        if self.counters is not None and self.n_counters is not None:
            arguments[self.counters] = counters(x.device, self.n_counters)
        on_device(x.device, self.runner, arguments)
        return self.kind(*made)


def _stand_in(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
