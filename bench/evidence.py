"""What a GPU run proves: the table that `linlora.backends` reads to choose a backend by itself.

A backend has an entry for an op when every case of the op it ran was green, and was timed on large shapes. The
speed-up over composed torch is the geometric mean over those shapes; `linlora.backends` asks for more than 1.
"""

from __future__ import annotations

from statistics import geometric_mean
from typing import TYPE_CHECKING

from linlora.backends import OPS

from .cases import Case

if TYPE_CHECKING:
    from .results import CaseResult


def evidence(results: list[CaseResult]) -> list[dict[str, object]]:
    """The entries that the results of a GPU run support."""
    entries: list[dict[str, object]] = []
    for backend in ("triton", "cuda"):
        for op in OPS:
            ours = f"linlora-{backend}"
            ran = [r for r in results if _speaks(r.case, op) and ours in r.outcomes]
            ran = [r for r in ran if r.outcomes[ours].status != "unavailable"]
            if not ran or any(r.outcomes[ours].status != "green" for r in ran):
                continue
            speedups = [r.speedup(ours, "linlora-torch") for r in ran if is_large(r.case)]
            timed = [speedup for speedup in speedups if speedup is not None]
            if timed:
                entries.append(
                    {
                        "op": op,
                        "backend": backend,
                        "correct": True,
                        "speedup_over_torch": round(geometric_mean(timed), 4),
                        "green_cases": len(ran),
                        "large_shapes": len(timed),
                    }
                )
    return entries


def _speaks(case: Case, op: str) -> bool:
    """Whether a case measures an op. The factor gradients are computed in the backward of a linearized layer."""
    if op == "factor_gradients":
        return case.op == "linearized_lora_linear" and case.phase == "forward_backward"
    return case.op == op


def is_large(case: Case) -> bool:
    """Shapes at which arithmetic, not launches, is the time: those training is made of."""
    if case.kind == "stream":
        return case.M >= 2048 and case.batch * case.heads * case.M * case.N >= 2**22
    return case.M >= 2048 and case.K * case.N >= 2**22
