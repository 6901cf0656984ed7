"""What the kernels are to reach on an H200 in bfloat16: time over `F.linear` of the same rows, and who measures it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cases import Case
from .results import CaseResult

OURS = ("linlora-cuda", "linlora-triton")


@dataclass(frozen=True)
class Goal:
    """At most `ratio` times the floor, at every case that it is about."""

    title: str
    ratio: float
    op: str
    phase: str
    rows: tuple[int, int]  # from, to
    rank: int | None = None  # of any

    def about(self, case: Case) -> bool:
        """Whether a case has to meet it."""
        first, last = self.rows
        shape = first <= case.M <= last and (last <= 64 or (case.K, case.N) == (4096, 4096))
        return (
            shape
            and (case.op, case.phase, case.dropout) == (self.op, self.phase, 0.0)
            and self.rank in (None, case.rank)
            and (case.form == "pair" or last <= 64)
        )

    def verdict(self, results: Iterable[CaseResult]) -> str:
        """Met or missed, with the worst case of the better backend."""
        ratios = {}
        for result in results:
            timed = [o.ratio for name in OURS if (o := result.outcomes.get(name)) is not None and o.ratio is not None]
            if self.about(result.case) and timed:
                ratios[result.case.id] = min(timed)
        if not ratios:
            return "not measured"
        worst = max(ratios, key=ratios.__getitem__)
        word = "met" if ratios[worst] <= self.ratio else "MISSED"
        return f"{word}: {ratios[worst]:.3f} ({worst}, the worst of {len(ratios)})"


_MAIN, _SMALL = (8192, 8192), (1, 64)
GOALS = (
    Goal("8192×4096×4096 forward, R = 2r = 32", 1.03, "linearized_lora_linear", "forward", _MAIN, 16),
    Goal("8192×4096×4096 forward, R = 2r = 128", 1.08, "linearized_lora_linear", "forward", _MAIN, 64),
    Goal("8192×4096×4096 dX, R = 2r = 32", 1.03, "linearized_lora_linear", "input_gradient", _MAIN, 16),
    Goal("8192×4096×4096 dX, R = 2r = 128", 1.08, "linearized_lora_linear", "input_gradient", _MAIN, 64),
    Goal("8192×4096×4096 two streams forward, r = 16", 1.03, "lora_linear", "forward", _MAIN, 16),
    Goal("8192×4096×4096 two streams dX, r = 16", 1.03, "lora_linear", "input_gradient", _MAIN, 16),
    Goal("M ≤ 64 forward", 1.15, "linearized_lora_linear", "forward", _SMALL),
)
