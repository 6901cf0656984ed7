"""The Triton kernels with a change of their configurations: a backend of its own for evidence to choose.

Its name is that of a change of `linlora.kernels.neighbours`, "triton num_stages+1"; `backend_of` has the first word.
Every launch of an op has the change, forward and backward, so that what runs is what was measured.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import linlora.kernels as kernels
from linlora.kernels.attention_problem import Attention, AttentionResult
from linlora.kernels.problem import LoraLinear, Result

OPS = ("linearized_lora_linear", "lora_linear", "linear", "attention")
"""The ops whose kernels have neighbours: those with products. Norms and activations have one size that matters."""


def backend_of(name: str) -> str:
    """The backend that a name is of: "triton" of "triton num_stages+1", and itself of a backend's.

    >>> backend_of("triton num_stages+1"), backend_of("cuda")
    ('triton', 'cuda')
    """
    return name.partition(" ")[0]


class Neighbour:
    """The kernels of `linlora.kernels`; those of `OPS` are launched with a change."""

    def __init__(self, change: str) -> None:
        self.change = change

    def lora_linear(self, problem: LoraLinear, **options: Any) -> Result:
        return kernels.lora_linear(problem, change=self.change, **options)

    def linear(self, x: Tensor, x_tangent: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return kernels.linear(x, x_tangent, weight, bias, change=self.change)

    def attention(self, problem: Attention) -> AttentionResult:
        return kernels.attention(problem, change=self.change)

    def attention_backward(
        self, problem: Attention, g: Tensor, result: AttentionResult
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels.attention_backward(problem, g, result, change=self.change)

    def __getattr__(self, name: str) -> Any:
        return getattr(kernels, name)
