"""The random tensors of a layer case, from which every provider is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Case

SCALING = 2.0  # alpha = 2 r, the usual choice


@dataclass(frozen=True)
class LayerData:
    """One layer, its input and its cotangents, on the device and in the dtype of the case.

    (A0, B0) is the linearization point and (A, B) = (A0 + dA, B0 + dB) the adapter now; plain LoRA is measured at
    (A, B). In the short form B0 and dA are None and A = A0. x_tangent and the second cotangent belong to `lora_linear`.
    """

    x: Tensor
    x_tangent: Tensor | None
    weight: Tensor
    bias: Tensor | None
    A0: Tensor
    B0: Tensor | None
    dA: Tensor | None
    dB: Tensor
    A: Tensor
    B: Tensor
    cotangents: tuple[Tensor, ...]
    scaling: float = SCALING

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.x_tangent is None else (self.x, self.x_tangent)


def random_layer(case: Case, device: torch.device, seed: int = 0) -> LayerData:
    """Normal noise of the magnitudes of a trained layer; the low-rank terms are as large as the base, so that an
    error in one of them shows in the output."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    M, K, N, r = case.M, case.K, case.N, case.rank
    dual = case.op == "lora_linear"
    x, x_tangent = normal(M, K), normal(M, K) if dual else None
    weight, bias = normal(N, K, scale=K**-0.5), normal(N) if case.bias else None
    A0, dB = normal(r, K, scale=K**-0.5), normal(N, r, scale=r**-0.5)
    B0 = dA = None
    A, B = A0, dB
    if case.form == "pair":
        B0 = normal(N, r, scale=r**-0.5)
        # Tangents as the differences that torch.func takes, rounding and all: every provider linearizes the same step.
        A, B = A0 + normal(r, K, scale=K**-0.5), B0 + dB
        dA, dB = A - A0, B - B0
    cotangents = tuple(normal(M, N) for _ in range(2 if dual else 1))
    for tensor in (x, x_tangent) if case.phase != "forward" else ():
        if tensor is not None:
            tensor.requires_grad_()
    return LayerData(x, x_tangent, weight, bias, A0, B0, dA, dB, A, B, cotangents)
