"""Zeroed int32 counters for kernels whose programs talk to each other.

A kernel that borrows counters leaves them all zero, so a launch needs neither a memset nor an epoch, and the buffer
of a stream is shared by every launch on it: launches of one stream never overlap. Under CUDA-graph capture the
counters are allocated and zeroed inside the graph instead, because a graph may be replayed on any stream. So they are
for every launch of compiled code: `torch.compile(mode="reduce-overhead")` warms up in the memory of its graphs, where
nothing may outlive the call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_buffers: dict[tuple[torch.device, int], Tensor] = {}
_compiled = threading.local()


@contextmanager
def for_compiled_code() -> Iterator[None]:
    """Launches inside keep no counters."""
    _compiled.runs = True
    try:
        yield
    finally:
        _compiled.runs = False


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros on the device, for one launch on its current stream."""
    if getattr(_compiled, "runs", False):
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    buffer = _buffers.get((device, stream))
    if buffer is None or buffer.numel() < count:
        # The buffer it replaces goes back to this stream's allocator, after the launches that still use it.
        buffer = torch.zeros(max(1024, 2 * count), dtype=torch.int32, device=device)
        if type(buffer) is Tensor and not buffer.is_meta:  # not the fake one that a tracer is given
            _buffers[device, stream] = buffer
    return buffer
