"""Tables of addresses: how one launch reads and writes the tensors of many layers.

A table is uploaded before every launch. The tensors whose addresses it holds are used on the stream that the launch is
queued on, like any argument.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .uploads import upload


def addresses(tensors: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """The addresses of tensors (int64, on the device), 0 of None."""
    return upload([0 if tensor is None else tensor.data_ptr() for tensor in tensors], torch.int64, device)


@triton.jit
def pointer_at(p_table, i_tensor, DTYPE: tl.constexpr):
    """The pointer to elements of DTYPE in place i_tensor of a table; null of None."""
    return tl.load(p_table + i_tensor).to(tl.pointer_type(DTYPE))


@triton.jit
def is_set(pointer):
    return pointer.to(tl.int64) != 0
