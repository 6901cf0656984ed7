"""`grouped_lora_linear` of model scope: both streams of a routed layer, and the gradient of the whole linearization.

The primal is the layer at its point (A0, B0), the same for all rows; only the tangent knows of groups. As in
`lora_linear`, the offsets A_t and B_t receive what the primal's derivative with respect to them is. Where B0 = 0 the
primal is the frozen layer alone, and A_t has neither effect nor gradient.
"""

from __future__ import annotations

from torch import Tensor

from linlora.kernels.grouped_problem import GroupedLoraLinear
from linlora.ops.backends import select_op
from linlora.ops.checks import autocast_input
from linlora.ops.dual.checks import check_constants
from linlora.ops.grouped_lora_linear import run_two_streams


def grouped_lora_linear(problem: GroupedLoraLinear) -> tuple[Tensor, Tensor]:
    """(y, y_tangent), both (..., N), of a problem with two streams and a point.

    A (T, K, r) and B (T, r, N) receive the gradient of y; W, b, A0 and B0 are frozen. Raises ValueError for what does
    not fit.
    """
    check_constants("grouped_lora_linear", x_tangent=problem.x_tangent)
    x, x_tangent = autocast_input(problem.x), problem.x_tangent
    x_tangent = None if x_tangent is None else autocast_input(x_tangent)
    problem = problem._replace(x=x, x_tangent=x_tangent, two_streams=True).check()
    assert problem.shrink is not None
    return run_two_streams(problem, select_op("routed_lora_linear", x, problem.weight, problem.shrink))
