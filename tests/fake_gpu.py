"""A GPU that the CPU plays: evidence decides the calls of CPU tensors, and every backend is said to run there."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from unittest import mock

import torch
from linlora.bench.measure import Turn

from linlora.ops import aten, backends, evidence
from linlora.ops.evidence import Call, Candidate, Entry
from linlora.ops.neighbours import backend_of

MACHINE = {
    "gpu": "NVIDIA H200", "architecture": "sm_90", "driver": "580.1", "torch": "2", "triton": "3", "sources": "abc",
}  # fmt: skip


class FakeGpu:
    """`cache` is its folder of evidence, `table` what the package holds, `obstacles` keep backends from running."""

    def __init__(self, root: Path) -> None:
        self.cache, self.table = root / "linlora" / "evidence", root / "evidence.json"
        self.table.write_text("[]")
        self.obstacles: dict[str, str] = {}
        self.patches = [
            mock.patch.dict("os.environ", {"XDG_CACHE_HOME": str(root)}),
            mock.patch.object(evidence, "TABLE", self.table),
            mock.patch.object(evidence, "machine", return_value=MACHINE),
            mock.patch.object(backends, "DECIDED", {"cpu"}),
            mock.patch.object(backends, "unavailable", side_effect=lambda name, device: self.obstacles.get(name)),
            mock.patch("torch.cuda.device_count", return_value=1),
            mock.patch("torch.cuda.get_device_name", return_value=MACHINE["gpu"]),
        ]

    def __enter__(self) -> FakeGpu:
        for patch in self.patches:
            patch.start()
        self.again()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self.patches):
            patch.stop()
        self.again()

    def again(self) -> None:
        """Forget what a process remembers, as a new one does."""
        evidence.forget()
        backends.decide_again()


def entry(call: Call, machine: dict[str, str] = MACHINE, date: str = "2026-01-02T03:04:05+00:00", **speeds) -> Entry:
    """An entry of one case in which composed torch takes 100 µs; `triton=2.0` is twice as fast, a word is a status."""
    candidates = {"torch": Candidate("green", error=1e-3, microseconds=(100.0,))}
    for name, speed in speeds.items():
        if isinstance(speed, str):
            candidates[name] = Candidate(speed, "y: rel err 1e0")
        else:
            candidates[name] = Candidate("green", error=1e-3, microseconds=(100.0 / speed,))
    return Entry(call, machine, date, "abc", ("pair forward",), candidates, {"F.linear": (50.0,), "PEFT": (None,)})


class ScriptedClock:
    """Times that the test says: seconds of (device, host) by backend, None for F.linear and PEFT. A neighbour without
    any has those of its backend."""

    def __init__(self, times: dict[str | None, tuple[float, float]]) -> None:
        self.times = times

    def turn(self, copies: list, steps: int) -> Turn:
        backend = copies[0].backend
        device, host = self.times.get(backend) or self.times[backend_of(backend)]
        return Turn(device, host)


class Wrong:
    """A backend that computes a LoRA layer and gets it wrong by a factor, at no cost."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def lora_linear(self, problem, save=True, primal=True):
        result = aten.lora_linear(problem, save, primal)
        return result._replace(y=None if result.y is None else result.y * self.factor)

    def __getattr__(self, name: str):
        return getattr(aten, name)


class FakeKernels(FakeGpu):
    """A GPU with a wrong `cuda` that is the fastest, and a `triton` that is composed torch and twice as fast as it."""

    TIMES = MappingProxyType(
        {None: (50e-6, 5e-6), "torch": (100e-6, 10e-6), "triton": (50e-6, 20e-6), "cuda": (1e-6, 1e-6)}
    )

    def __init__(self, root: Path) -> None:
        from linlora.bench import runner, tuning

        super().__init__(root)
        self.times = dict(self.TIMES)
        self.patches += [
            mock.patch.object(runner, "clock_of", return_value=ScriptedClock(self.times)),
            mock.patch.object(tuning, "this_gpu", return_value=torch.device("cpu")),
            mock.patch.dict(backends._MODULES, {name: Wrong(1.0) for name in backends._MODULES if "triton" in name}),
            mock.patch.dict(backends._MODULES, cuda=Wrong(1.5)),
        ]
