"""The `cuda` backend: hand-written kernels (csrc/) of the hottest op. It has every other op from `triton`.

The kernels serve float16 and bfloat16, ranks to 256, no dropout: `refusal` says so, once, for the automatic choice and
for `use_backend("cuda")`, where it is an error. Which architecture's kernel runs follows from the device and the call:
Hopper's own where it can, else the portable one.
"""

from __future__ import annotations

from typing import Any

import torch

from linlora import kernels
from linlora.ops.cuda import library
from linlora.ops.cuda.library import lora_linear

__all__ = ["MAX_RANK", "OPS", "availability", "lora_linear", "refusal"]

OPS = ("linearized_lora_linear", "lora_linear")
"""What has a CUDA kernel."""

MAX_RANK = 256
_DTYPES = (torch.float16, torch.bfloat16)


def __getattr__(name: str) -> Any:
    """Every op without a CUDA kernel is Triton's."""
    return getattr(kernels, name)


def availability(device: torch.device) -> str | None:
    """None when the kernels run on tensors of this device; otherwise the reason, with the remedy."""
    return library.obstacle(device) or kernels.availability(device)


def refusal(dtype: torch.dtype | None, rank: int, dropout: bool) -> str | None:
    """Why the kernels do not serve such a call, with the remedy; None when they do.

    >>> refusal(torch.bfloat16, 16, dropout=False) is None
    True
    >>> print(refusal(torch.bfloat16, 16, dropout=True))
    its kernels have no dropout: use the 'triton' backend, or lora_dropout=0
    """
    if dtype is not None and dtype not in _DTYPES:
        got = str(dtype).removeprefix("torch.")
        return (
            f"its kernels take float16 and bfloat16, got {got}: cast, use torch.autocast, or use the 'triton' backend"
        )
    if rank > MAX_RANK:
        return f"its kernels take ranks to {MAX_RANK}, got {rank}: use the 'torch' backend"
    return "its kernels have no dropout: use the 'triton' backend, or lora_dropout=0" if dropout else None
