"""Numbers of the host on a device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_captured: list[Tensor] = []


def upload(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers, or of a list of lists of them.

    On a GPU it is copied from pinned memory: a copy from other memory waits, which ends the capture of a CUDA graph. A
    graph reads the host's copy again at every replay, so one that is made under capture is kept for good.
    """
    host = torch.tensor(numbers, dtype=dtype, device="cpu")  # whatever the default device is
    if device.type != "cuda":
        return host.to(device)
    host = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)
