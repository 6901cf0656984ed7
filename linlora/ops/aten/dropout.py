"""Dropout of composed calls, which keep their mask: a byte an element, made once and read wherever it lies.

Kernels recompute the mask of `linlora.reference.keep_mask` from a seed, bit by bit. Composed, that is some thirty calls
as large as x; one call of torch's own generator draws a mask instead. So where a problem has a `seed`, composed calls
take three things: a seed, whose mask is that of the kernels; a mask itself, (M, K); None, which draws one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linlora.ops.transforms import transform_active
from linlora.reference import keep_mask

_MASK_ROWS = 128
"""Rows of a seed's mask made at a time: they stay in the L2 cache (8.0 -> 2.4 ms at 2048x1024, 2 cores)."""


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a device that waits for calls and for memory, where one large call beats two."""
    return not x.is_cpu


def with_mask(problem: Any) -> Any:
    """The problem with the mask of its dropout in place of its seed, for all that reads it: both streams, backward."""
    if problem.dropout_p == 0.0:
        return problem
    return problem._replace(seed=mask(problem.x, problem.dropout_p, problem.seed))


def mask(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Which elements of x (..., K) are kept, a bool matrix (M, K); on a CPU drawn with p to 16 bits.

    A CPU draws four elements from 64 bits: 2.7 instead of 28 ms for `bernoulli_` at 2048x1024 on one busy core.
    """
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    if seed is not None and seed.dim() == 2:
        return seed
    if seed is None and not transform_active() and not torch.compiler.is_compiling():
        if on_gpu(x):
            return torch.empty(rows, columns, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
        bits = torch.empty(-(-rows * columns // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        return bits[: rows * columns].view(rows, columns) >= min(round(p * 2**16), 2**16 - 1) - 2**15
    seed = drawn_seed(x) if seed is None else seed
    step = rows if on_gpu(x) or torch.compiler.is_compiling() else _MASK_ROWS
    blocks = [
        keep_mask(min(step, rows - first), columns, p, seed, first) for first in range(0, max(rows, 1), max(step, 1))
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def drawn_seed(x: Tensor) -> Tensor:
    """A seed for tensors on the device of x."""
    return torch.randint(2**31, (), device=x.device)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x ⊙ mask / (1 − p) for x (..., K); differentiable in x."""
    if p == 0.0:
        return x
    keep = mask(x, p, seed).view(x.shape)
    if on_gpu(x) and not transform_active():
        return torch.ops.aten.native_dropout_backward(x, keep, 1.0 / (1.0 - p))
    return (x * keep).mul_(1.0 / (1.0 - p))
