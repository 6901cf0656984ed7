"""Memory: the peak of a step, with everything that stays between steps.

    peak = bytes of the resident tensors + the highest sum of live allocations during one step

Resident tensors (parameters, buffers, inputs, optimizer state) that share storage count once. Allocations of the step
come from the CUDA caching allocator's statistics on a GPU, and on a CPU from the profiler's record of every allocation
and release, which sees temporaries inside aten ops too and, unlike the resident set size of the process, is exact.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .job import Job
from .measure import synchronize


def peak_bytes(job: Job, device: torch.device) -> int:
    """Peak memory of one step of a job that has run before."""
    gc.collect()
    resident = resident_bytes(list(job.resident()))
    with job.context():
        return resident + (_peak_on_gpu(job, device) if device.type == "cuda" else _peak_on_cpu(job))


def resident_bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def kept_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """What a call leaves allocated while its result is held: of a forward, what its backward needs."""
    gc.collect()
    if device.type != "cuda":
        return sum(_allocations(work))
    before = torch.cuda.memory_allocated(device)
    held = work()
    after = torch.cuda.memory_allocated(device)
    del held
    return after - before


def _peak_on_gpu(job: Job, device: torch.device) -> int:
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    job.step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(job: Job) -> int:
    return max(accumulate(_allocations(job.step), initial=0))


def _allocations(work: Callable[[], Any]) -> list[int]:
    """The bytes of every allocation of a call, those of releases negative, in order; its result is held."""
    with _without_standard_error(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        held = work()
    del held
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in events]


@contextmanager
def _without_standard_error() -> Iterator[None]:
    """The profiler writes lines of its own to file descriptor 2."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
