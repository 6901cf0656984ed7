"""Tables of addresses: how one launch reads and writes the tensors of many layers.

A table is uploaded before every launch from pinned memory, which does not wait for the device. The tensors whose
addresses it holds are used on the stream that the launch is queued on, like any argument.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

_captured: list[Tensor] = []


def addresses(tensors: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """The addresses of tensors (int64, on the device), 0 of None.

    A CUDA graph reads the host's copy again at every replay, so a copy made under capture is kept for good.
    """
    table = torch.tensor([0 if tensor is None else tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    if device.type != "cuda":
        return table.to(device)
    table = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(table)
    return table.to(device, non_blocking=True)


@triton.jit
def pointer_at(p_table, i_tensor, DTYPE: tl.constexpr):
    """The pointer to elements of DTYPE in place i_tensor of a table; null of None."""
    return tl.load(p_table + i_tensor).to(tl.pointer_type(DTYPE))


@triton.jit
def is_set(pointer):
    return pointer.to(tl.int64) != 0
