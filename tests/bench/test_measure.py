"""Clocks and scales on jobs whose time and memory are known."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
import torch
from linlora.bench.measure import DeviceClock, Turn, WallClock, interleaved, quantiles, ratio
from linlora.bench.memory import peak_bytes

CPU = torch.device("cpu")
MEBIBYTE = 2**20


class FakeJob:
    def __init__(self, step, resident=()) -> None:
        self.step, self._resident = step, resident

    def context(self) -> ExitStack:
        return ExitStack()

    def resident(self):
        return self._resident


def test_the_clock_measures_a_sleep() -> None:
    began = time.perf_counter()
    turn = WallClock(CPU).turn([FakeJob(lambda: time.sleep(0.01))], 2)
    assert 0.01 <= turn.seconds <= (time.perf_counter() - began) / 2  # two steps; a busy machine sleeps longer


def test_providers_take_turns_and_every_one_begins_a_round() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.order: list[str] = []

        def turn(self, copies, steps) -> Turn:
            self.order.append(copies[0])
            return Turn(0.01)

    recorder = Recorder()
    turns = interleaved({"a": ["a"], "b": ["b"], "c": ["c"]}, recorder, seconds=0)
    assert {name: len(taken) for name, taken in turns.items()} == {"a": 3, "b": 3, "c": 3}
    measured = recorder.order[6:]  # after warming up and estimating
    assert measured[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_a_ratio_is_taken_within_rounds() -> None:
    assert ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0


def test_quantiles_are_those_of_the_samples() -> None:
    assert quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_peak_memory_is_resident_plus_the_highest_sum_of_live_allocations() -> None:
    weight = torch.ones(MEBIBYTE // 4)

    def step() -> torch.Tensor:
        first = weight + 1.0
        second = first + 1.0
        del first
        return second + 1.0

    job = FakeJob(step, [weight, weight.view(2, -1)])
    assert peak_bytes(job, CPU) == pytest.approx(3 * MEBIBYTE, rel=0.01)


def test_a_starved_turn_is_repeated_behind_a_longer_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.record = self.synchronize = lambda: None

        def query(self) -> bool:
            return len(sleeps) < 3  # the first two sleeps end before the work is queued

        def elapsed_time(self, end) -> float:
            return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleeps.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    turn = DeviceClock().turn([FakeJob(lambda: None)], 4)
    assert sleeps[0] < sleeps[1] < sleeps[2]
    assert len(sleeps) == 3
    assert turn.seconds == pytest.approx(0.002)
    assert not turn.starved


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_time_is_that_of_the_gpu_not_of_the_host() -> None:
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    job = FakeJob(lambda: x @ x)
    clock = DeviceClock()
    clock.turn([job], 4)
    turn = clock.turn([job], 16)
    assert not turn.starved
    assert 1e-5 < turn.seconds < 1e-2
