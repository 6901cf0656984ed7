"""`attention` on both streams of model scope: O(S) memory, six products of S × S tiles against two for plain attention.

Its backward is that of plain attention: the tangent is a constant to autograd, and nothing is kept for it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from linlora.kernels.attention_problem import Attention
from linlora.ops.attention import prepared, run
from linlora.ops.dual.checks import check_constants


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None = None,
    k_tangent: Tensor | None = None,
    v_tangent: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(o, o_tangent), both (B, H, Sq, Dv); arguments and options as in `linlora.functional.attention`.

    Gradients reach q, k and v through o alone. Raises ValueError for what does not fit.
    """
    check_constants("attention", q_tangent=q_tangent, k_tangent=k_tangent, v_tangent=v_tangent)
    problem = Attention(q, k, v, q_tangent, k_tangent, v_tangent, **options)
    return run(prepared(problem), constant_tangent=True)
