"""The kernels by themselves: designs that a backend chooses between, each asked for, without autograd around them.

triton-recompute    every column of tiles computes x Aᵀ again        triton-flags    persistent, x Aᵀ shared by flags
cuda-sm80           the portable kernel of csrc/                     cuda-sm90       Hopper's own
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from linlora.kernels.packing import pack, unpack
from linlora.kernels.problem import LoraLinear, Result
from torch import Tensor

from linlora.ops import cuda

from .cases import Case
from .data import LayerData
from .job import switched

Host = Callable[..., Result]
"""A kernel's host function: of a problem, with `save`."""


@dataclass
class KernelJob:
    """One launch: the forward of a layer, or the gradient of its input, which is the same kernel on the transposes."""

    case: Case
    data: LayerData
    host: Host

    def __post_init__(self) -> None:
        tensors, numbers = pack(self.data.problem)
        self.problem = unpack(LoraLinear, [t if t is None else t.detach() for t in tensors], numbers)
        if self.case.phase != "forward":
            self.problem = self.problem.adjoint(*self.data.cotangents)

    def context(self) -> ExitStack:
        return switched(None, grad=False)

    def step(self) -> Result:
        return self.host(self.problem, save=self.case.phase == "forward" or self.problem.two_streams)

    def results(self) -> dict[str, Tensor]:
        with self.context():
            y, y_tangent, *_ = self.step()
        if self.case.phase == "forward":
            found = {"y": y, "y_tangent": y_tangent}
        elif self.problem.two_streams:
            found = {"grad_x_tangent": y, "grad_x": y_tangent}
        else:
            found = {"grad_x": y}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def resident(self) -> Iterable[Tensor]:
        return self.data.tensors


def triton(case: Case, data: LayerData, design: str) -> KernelJob:
    """A Triton kernel of a design. Raises NotImplementedError where no row of the table has it for this case."""
    from linlora.kernels.launch import configuration
    from linlora.kernels.linearized_lora_linear import host

    job = KernelJob(case, data, host)
    config = configuration(job.problem, descriptors=design == "flags")
    if config.design != design:
        raise NotImplementedError(f"the table has no {design!r} configuration for this case")
    job.host = partial(host, config=config)
    return job


def csrc(case: Case, data: LayerData, kernel: int) -> KernelJob:
    """The CUDA kernel of an architecture. Raises NotImplementedError for what it does not compute."""
    job = KernelJob(case, data, partial(cuda.lora_linear, kernel=kernel))
    try:
        job.results()
    except RuntimeError as error:
        if "cannot compute this" in str(error):  # csrc/dispatch.h
            raise NotImplementedError(str(error)) from None
        raise
    return job
