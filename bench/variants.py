"""The kernels by themselves: designs that a backend chooses between, each asked for, without autograd around them.

triton-recompute    every column of tiles computes x Aᵀ again        triton-flags    persistent, x Aᵀ shared by flags
cuda-sm80           the portable kernel of csrc/                     cuda-sm90       Hopper's own
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from linlora.ops import cuda

from .cases import Case
from .data import LayerData
from .job import switched

Host = Callable[..., tuple[Tensor, ...]]
"""A kernel's host function: of the matrices, in the order of `linlora.kernels`."""


@dataclass
class KernelJob:
    """One launch: the forward of a layer, or the gradient of its input, which is the same kernel on the transposes."""

    case: Case
    data: LayerData
    host: Host

    def __post_init__(self) -> None:
        data, dual = self.data, self.case.op == "lora_linear"
        if self.case.phase == "forward":
            streams = (data.x, data.x_tangent) if dual else (data.x,)
            operands = (data.weight, data.bias, data.A0, data.dA, data.B0, data.dB)
            self.options: dict[str, Any] = {}
        else:
            streams = tuple(reversed(data.cotangents)) if dual else data.cotangents
            operands = (data.weight.t(), None, *_adjoint_factors(data))
            self.options = {"adjoint": True}
        if not dual:
            self.options["save"] = self.case.phase == "forward"
        self.arguments = (*(t if t is None else t.detach() for t in (*streams, *operands)), data.scaling)

    def context(self) -> ExitStack:
        return switched(None, grad=False)

    def step(self) -> tuple[Tensor, ...]:
        return self.host(*self.arguments, **self.options)

    def results(self) -> dict[str, Tensor]:
        with self.context():
            outputs = self.step()
        forward, dual = self.case.phase == "forward", self.case.op == "lora_linear"
        if dual:
            names = ("y", "y_tangent") if forward else ("grad_x_tangent", "grad_x")
        else:
            names = ("y",) if forward else ("grad_x",)
        return dict(zip(names, outputs, strict=False))

    def resident(self) -> Iterable[Tensor]:
        return self.data.tensors


def _adjoint_factors(data: LayerData) -> tuple[Tensor | None, ...]:
    """(shrink, d_shrink, expand, d_expand) of the transposes: see `linlora.ops.lora_linear`."""
    if data.B0 is None or data.dA is None:
        return data.dB.t(), None, None, data.A0.t()
    return data.B0.t(), data.dB.t(), data.A0.t(), data.dA.t()


def triton(case: Case, data: LayerData, design: str) -> KernelJob:
    """A Triton kernel of a design. Raises NotImplementedError where no row of the table has it for this case."""
    from linlora.kernels import linearized_lora_linear
    from linlora.kernels.configs import select
    from linlora.kernels.device import device_traits

    traits = device_traits(data.x.device)
    config = select(
        "linearized_lora_linear", m=case.M, n=case.N if case.phase == "forward" else case.K, rank=case.rank,
        itemsize=data.x.element_size(), architecture=traits.architecture, multiprocessors=traits.multiprocessors,
        descriptors=design == "flags",
    )  # fmt: skip
    if config.design != design:
        raise NotImplementedError(f"the table has no {design!r} configuration for this case")
    return KernelJob(case, data, partial(linearized_lora_linear, config=config))


def csrc(case: Case, data: LayerData, kernel: int) -> KernelJob:
    """The CUDA kernel of an architecture. Raises NotImplementedError for what it does not compute."""
    job = KernelJob(case, data, partial(getattr(cuda, case.op), kernel=kernel))
    try:
        job.results()
    except RuntimeError as error:
        if "cannot compute this" in str(error):  # csrc/dispatch.h
            raise NotImplementedError(str(error)) from None
        raise
    return job
