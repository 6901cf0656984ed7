"""Time: every provider in turn, round after round, so that a drift of the machine falls on all of them alike.

A turn is a few steps of one provider; a sample is its time per step. Rounds are repeated until the time of the case is
used up. On a GPU a turn is timed by events over a backlog: the stream is held by a sleeping kernel until all steps of
the turn are queued, because a stream that starves times the host. A turn that starved nevertheless is repeated behind
a longer sleep. Steps walk through copies of the layer whose tensors do not fit in the L2 cache together.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .job import Job

_TURN_SECONDS = 2e-3  # long against the resolution of every clock
_MIN_ROUNDS, _MAX_ROUNDS = 3, 60
_MAX_QUEUED_STEPS = 16  # a CUDA stream takes about a thousand launches before it blocks the host
_SLEEP_CYCLES_PER_SECOND = 2e9
_MAX_SLEEP_SECONDS = 0.25


class Turn(NamedTuple):
    """Seconds per step; on a GPU also those the host needed to queue it, and whether the stream starved."""

    seconds: float
    host_seconds: float | None = None
    starved: bool = False


class Clock(Protocol):
    """Times a turn of `steps` steps over the copies of a job."""

    def turn(self, copies: Sequence[Job], steps: int) -> Turn: ...


class WallClock:
    """What the user waits for: host and device together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def turn(self, copies: Sequence[Job], steps: int) -> Turn:
        work = [copies[i % len(copies)].step for i in range(steps)]
        with copies[0].context():
            synchronize(self.device)
            start = time.perf_counter()
            for step in work:
                step()
            synchronize(self.device)
            return Turn((time.perf_counter() - start) / steps)


@dataclass
class DeviceClock:
    """What the GPU is busy for."""

    sleep_seconds: float = 2e-3

    def turn(self, copies: Sequence[Job], steps: int) -> Turn:
        steps = min(steps, _MAX_QUEUED_STEPS)
        work = [copies[i % len(copies)].step for i in range(steps)]
        with copies[0].context():
            while True:
                seconds, host_seconds, starved = self._queue(work)
                if not starved or self.sleep_seconds >= _MAX_SLEEP_SECONDS:
                    break
                self.sleep_seconds = min(2 * max(self.sleep_seconds, host_seconds), _MAX_SLEEP_SECONDS)
        return Turn(seconds / steps, host_seconds / steps, starved)

    def _queue(self, work: list) -> tuple[float, float, bool]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self.sleep_seconds * _SLEEP_CYCLES_PER_SECOND))
        start.record()
        began = time.perf_counter()
        for step in work:
            step()
        host_seconds = time.perf_counter() - began
        starved = start.query()  # the sleep was over before the last step was queued
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, host_seconds, starved


def interleaved(jobs: dict[str, list[Job]], clock: Clock, seconds: float) -> dict[str, list[Turn]]:
    """Turns of every provider, one of each per round, taken for about `seconds`."""
    end = time.perf_counter() + seconds
    steps = {name: _steps_of_a_turn(copies, clock) for name, copies in jobs.items()}
    turns: dict[str, list[Turn]] = {name: [] for name in jobs}
    names = list(jobs)
    gc.collect()
    gc.disable()
    try:
        for round in range(_MAX_ROUNDS):
            if round >= _MIN_ROUNDS and time.perf_counter() > end:
                break
            first = round % len(names)
            for name in names[first:] + names[:first]:
                turns[name].append(clock.turn(jobs[name], steps[name]))
    finally:
        gc.enable()
    return turns


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(20 %, median, 80 %)."""
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def ratio(samples: Sequence[float], floor: Sequence[float]) -> float:
    """The median over rounds of time over the floor's time in the same round: drifts cancel inside a round."""
    return statistics.median(a / b for a, b in zip(samples, floor, strict=True))


def copies_past_cache(bytes_of_one: int, device: torch.device) -> int:
    """How many copies of a layer do not fit in twice the L2 cache together, at most 16; one on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(math.ceil(2 * cache / max(bytes_of_one, 1)), 1), 16)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _steps_of_a_turn(copies: list[Job], clock: Clock) -> int:
    first = clock.turn(copies, len(copies))  # compiles, allocates and fills caches
    if len(copies) == 1 and first.seconds > 50 * _TURN_SECONDS:
        return 1  # long enough to need no second look
    return max(math.ceil(_TURN_SECONDS / clock.turn(copies, 1).seconds), 1)
