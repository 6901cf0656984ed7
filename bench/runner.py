"""Run cases: build the jobs of a case, pass the gate, time in turns what is green, weigh it, pass the gate again."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from linlora.storage.environment import environment

from . import gate
from .cases import Case
from .data import Data, random_data
from .floors import roofline_seconds
from .job import Job
from .measure import Clock, DeviceClock, Turn, WallClock, copies_past_cache, interleaved, quantiles, ratio
from .memory import peak_bytes, resident_bytes
from .providers import FLOOR, TORCH, Provider
from .results import CaseResult, Outcome, Run


def run(
    suite: str,
    cases: list[Case],
    providers: list[Provider],
    device: torch.device,
    seconds: float,
    after_case: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Run the cases within about `seconds` of wall-clock time; what no time is left for is listed in `not_run`.

    Every case gets an equal share of the time that is left, so what a cheap case saves goes to those after it.
    """
    made = Run(suite, str(device), environment(device))
    end = time.perf_counter() + seconds
    for i, case in enumerate(cases):
        left = end - time.perf_counter()
        if left <= 0:
            made.not_run.append(case.id)
        else:
            made.results.append(run_case(case, providers, device, left / (len(cases) - i)))
        after_case(made)
    return made


def run_case(
    case: Case, providers: list[Provider], device: torch.device, seconds: float, weighs: bool = True
) -> CaseResult:
    """One case in about `seconds`, as far as building, checking and three rounds allow; `weighs`: with memory."""
    began = time.perf_counter()
    providers = [provider for provider in providers if provider.serves(case)]
    with _resources(device):
        data = _copies(case, device)
        outcomes: dict[str, Outcome] = {}
        jobs: dict[str, list[Job]] = {}
        oracle = _Gate(case, data[0], device)
        for provider in sorted(providers, key=lambda provider: provider is not TORCH):  # the yardstick first
            if (obstacle := provider.obstacle(case, device)) is not None:
                outcomes[provider.name] = Outcome("unavailable", obstacle)
                continue
            try:
                copies = [provider.job(case, device, copy) for copy in data]
                outcomes[provider.name] = oracle.check(provider, copies[0])
                if outcomes[provider.name].status == "green":
                    jobs[provider.name] = copies
            except Exception as error:  # a provider that breaks is a line of the report, not the end of the run
                outcomes[provider.name] = _broken(provider, error)
        if FLOOR.name in jobs:
            left = seconds - (time.perf_counter() - began)
            turns = interleaved(jobs, clock_of(case, device), left)
            for name, taken in turns.items():
                outcomes[name] = _outcome(case, outcomes[name], taken, turns[FLOOR.name], device)
            for provider in providers:
                if provider.name in jobs:
                    job = jobs[provider.name][0]
                    outcomes[provider.name] = oracle.recheck(provider, job, outcomes[provider.name])
                    if weighs and outcomes[provider.name].status == "green":
                        peak = peak_bytes(job, device) / 1e6
                        outcomes[provider.name] = replace(outcomes[provider.name], peak_mb=peak)
        return CaseResult(case, {p.name: outcomes[p.name] for p in providers})


class _Gate:
    """The gate of one case: references are computed once for each function, in float64."""

    def __init__(self, case: Case, data: Data | None, device: torch.device) -> None:
        self.case, self.data, self.device = case, data, device
        self.expected: dict[str, dict[str, torch.Tensor]] = {}
        self.composed: gate.Errors | None = None

    def check(self, provider: Provider, job: Job) -> Outcome:
        function = provider.function
        if function not in self.expected:
            self.expected[function] = gate.expected(self.case, function, self.data, self.device)
        with gate.poisoned() if provider.runs_kernels else contextlib.nullcontext():
            results = job.results()
        errors = gate.errors(results, self.expected[function])
        problem = gate.verdict(self.case, errors, self.composed)
        if provider is TORCH:
            self.composed = errors
        return Outcome("green" if problem is None else "wrong", problem or "", errors)

    def recheck(self, provider: Provider, job: Job, outcome: Outcome) -> Outcome:
        """Once more after the timing, for errors that come and go."""
        if self.case.kind != "model":  # a model has been trained meanwhile
            again = self.check(provider, job)
            if again.status != "green":
                return replace(again, detail=f"after timing, {again.detail}")
        return outcome


def _copies(case: Case, device: torch.device) -> list[Any]:
    """The tensors of the case as often as it takes to leave the cache."""
    first = random_data(case, device)
    if first is None:
        return [None]
    count = copies_past_cache(resident_bytes(first.tensors), device)
    return [first, *(random_data(case, device, seed) for seed in range(1, count))]


def clock_of(case: Case, device: torch.device) -> Clock:
    """The host belongs to the time of a whole training step; a layer's is what the GPU needs for it."""
    return DeviceClock() if device.type == "cuda" and case.kind != "model" else WallClock(device)


def _outcome(case: Case, checked: Outcome, turns: list[Turn], floor: list[Turn], device: torch.device) -> Outcome:
    seconds = [turn.seconds for turn in turns]
    p20, median, p80 = quantiles(seconds)
    host = [turn.host_seconds for turn in turns if turn.host_seconds is not None]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    least = roofline_seconds(case, gpu)
    return replace(
        checked,
        median_ms=median * 1e3,
        p20_ms=p20 * 1e3,
        p80_ms=p80 * 1e3,
        ratio=ratio(seconds, [turn.seconds for turn in floor]),
        rounds=len(turns),
        host_ms=statistics.median(host) * 1e3 if host else None,
        starved=statistics.mean(turn.starved for turn in turns) if host else None,
        roofline=None if least is None else least / median,
    )


def _broken(provider: Provider, error: Exception) -> Outcome:
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if provider.compiled:
        return Outcome("unavailable", f"torch.compile gave up: {text}")
    if provider.package:
        return Outcome("unavailable", f"{provider.package} gave up: {text}")
    if isinstance(error, torch.OutOfMemoryError) and provider.backend is None:
        return Outcome("unavailable", "out of memory")
    return Outcome("failed", text)


@contextlib.contextmanager
def _resources(device: torch.device) -> Iterator[None]:
    """A clean slate for a case: compiled code of earlier cases forgotten, freed memory given back."""
    import torch._dynamo

    torch._dynamo.reset()
    # A silent fall-back to eager is no time.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()
