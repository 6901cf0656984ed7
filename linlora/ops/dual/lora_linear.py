"""`lora_linear` of model scope: both streams of a LoRA layer, and the gradient of the whole network's linearization."""

from __future__ import annotations

from torch import Tensor

from linlora.kernels.problem import LoraLinear
from linlora.ops.checks import autocast_input
from linlora.ops.dual.checks import check_constants
from linlora.ops.lora_linear import run


def lora_linear(problem: LoraLinear) -> tuple[Tensor, Tensor]:
    """(y, y_tangent), both (..., N), of a problem with two streams.

    dA and dB receive the gradient of y; W, b, A0 and B0 are frozen. Raises ValueError for what does not fit.
    """
    check_constants("lora_linear", x_tangent=problem.x_tangent)
    x, x_tangent = autocast_input(problem.x), problem.x_tangent
    x_tangent = None if x_tangent is None else autocast_input(x_tangent)
    if x is not problem.x or x_tangent is not problem.x_tangent:
        problem = problem._replace(x=x, x_tangent=x_tangent)
    return run(problem.check(), constant_tangent=True)
