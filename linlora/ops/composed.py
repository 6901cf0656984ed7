"""Calls that run composed of differentiable aten calls, although a backend was chosen.

There are three. Under a `torch.func` transform or forward-mode AD every aten call is differentiated exactly, where a
fused Function would have to refuse. On the `torch` backend a Function written in Python costs about 70 us a call more
than C++ autograd, which small problems do not earn back (`SMALL`). And where a dimension is 0 no backend has anything
to launch: the result is that of `F.linear`, with gradients of zeros.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linlora.ops import aten
from linlora.ops.transforms import refuse_double_backward, transform_active

SMALL = 2**18
"""Elements of x and y together below which calls run composed on the torch backend: bench/NOTES.md, note 1."""


def preferred(backend: ModuleType, x: Tensor, weight: Tensor, rank: int, dropout_p: float) -> bool:
    """Whether a call on this backend should run composed: an empty one, or one on the torch backend that is small and
    has no mask that would be saved."""
    n, k = weight.shape
    if x.numel() == 0 or n == 0 or rank == 0:
        return True
    if backend is not aten or dropout_p > 0.0:
        return False
    return x.numel() * (n + k) < SMALL * k


def with_dropout(backend: ModuleType, problem: Any) -> Any:
    """The problem with what its dropout is made of: composed calls keep a mask, kernels recompute theirs from a seed.

    So do composed calls that torch.compile makes kernels of, or that a transform differentiates.
    """
    if problem.dropout_p == 0.0:
        return problem
    if backend is aten and not transform_active() and not torch.compiler.is_compiling():
        return aten.with_mask(problem)
    return problem if problem.seed is not None else problem._replace(seed=aten.drawn_seed(problem.x))


def backward_backend(op: str, backend: ModuleType, *cotangents: Tensor | None) -> ModuleType:
    """What the backward of an op runs on: the backend of its forward, under a transform aten calls.

    Raises RuntimeError where the backward itself is being recorded, and for the batch of cotangents that
    `torch.autograd.grad(..., is_grads_batched=True)` makes, which is no transform of torch.func.
    """
    refuse_double_backward(op)
    compiling = torch.compiler.is_compiling()  # which does not trace the question, and has no such batch
    if not compiling and any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in cotangents):
        raise RuntimeError(
            f"{op}: the fused backward takes one cotangent, not a batch (is_grads_batched=True, vectorize=True). "
            "Take torch.func.vjp of the function and torch.func.vmap of that, or torch.func.jacrev."
        )
    return aten if transform_active() else backend
