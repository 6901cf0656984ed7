"""A run and its file: one JSON with the environment, every case and every provider's outcome."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from linlora.storage.files import write_text

from .cases import Case
from .floors import flops

SCHEMA = 1

Status = Literal["green", "wrong", "failed", "unavailable"]


@dataclass(frozen=True)
class Outcome:
    """What became of one provider on one case. Only a green one has times.

    `ratio` is the time over that of the frozen `nn.Linear`, the median over the rounds; `host_ms` what the host needs
    to queue a step on a GPU; `roofline` the least time by the GPU's data sheet over the measured time, `starved` the
    fraction of samples in which the GPU waited for the host.
    """

    status: Status
    detail: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None
    rounds: int = 0
    peak_mb: float | None = None
    host_ms: float | None = None
    starved: float | None = None
    roofline: float | None = None


@dataclass(frozen=True)
class CaseResult:
    """One case and the outcomes of its providers, by name."""

    case: Case
    outcomes: dict[str, Outcome]

    def speedup(self, ours: str, peer: str) -> float | None:
        """How many times faster `ours` is than `peer`; None unless both were timed."""
        return _over(self._get(peer, "ratio"), self._get(ours, "ratio"))

    def memory(self, ours: str, peer: str) -> float | None:
        """Peak memory of `ours` over that of `peer`."""
        return _over(self._get(ours, "peak_mb"), self._get(peer, "peak_mb"))

    def tflops(self, name: str) -> float | None:
        """10¹² FLOPs of the case (`linlora.bench.floors`) a second; None where the FLOPs are not counted."""
        rate = _over(flops(self.case), self._get(name, "median_ms"))
        return rate / 1e9 if rate else None

    def _get(self, name: str, value: str) -> float | None:
        return getattr(self.outcomes.get(name), value, None)


@dataclass
class Run:
    """A whole run."""

    suite: str
    device: str
    environment: dict[str, Any]
    results: list[CaseResult] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    @property
    def red(self) -> Iterator[tuple[Case, str, Outcome]]:
        """Every outcome that is wrong or failed."""
        for result in self.results:
            for name, outcome in result.outcomes.items():
                if outcome.status in ("wrong", "failed"):
                    yield result.case, name, outcome

    def save(self, path: Path) -> None:
        """Write the run; the file is whole at any moment, so that a run cut short leaves what it had."""
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "suite": self.suite,
            "device": self.device,
            "environment": self.environment,
            "results": [asdict(result) for result in self.results],
            "not_run": self.not_run,
        }
        write_text(path, json.dumps(_finite(content), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run. Raises ValueError for a file that is not one."""
        try:
            content = json.loads(path.read_text())
            if content["schema"] != SCHEMA:
                raise ValueError(f"{path}: schema {content['schema']}, this version reads {SCHEMA}")
            results = [
                CaseResult(
                    Case(**result["case"]),
                    {name: _outcome(outcome) for name, outcome in result["outcomes"].items()},
                )
                for result in content["results"]
            ]
            names = ("suite", "device", "environment", "not_run")
            return cls(**{name: content[name] for name in names}, results=results)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a result file of `linlora bench`: {type(error).__name__}: {error}"
            ) from error


def _outcome(content: dict[str, Any]) -> Outcome:
    errors = {name: float(error) for name, error in content.pop("errors").items()}
    return Outcome(**content, errors=errors)


def _over(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def _finite(value: Any) -> Any:
    """JSON has no infinity: it is written as a string, which float() reads."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
