"""The evidence of GPU runs: the table by which `linlora.ops.backends` chooses, made of the files under results/.

An entry speaks of one backend and op, in a class of shapes, a dtype, with dropout or without. It is correct when every
case of the op that ran in this dtype and with or without dropout was green, whatever its shape. The speed-up over
composed torch is the geometric mean over the cases of the class; of an op whose class is "any", over large shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean

from linlora.ops import cuda
from linlora.ops.backends import LAYER_OPS, OPS
from linlora.ops.evidence import ShapeClass, shape_class

from .cases import Case
from .results import CaseResult, Run

RESULTS = Path(__file__).parent / "results"
_KEY = ("op", "backend", "architecture", "gpu", "shape", "dtype", "dropout")
_SHAPES: tuple[ShapeClass, ...] = ("small", "medium", "large")


def table(folder: Path = RESULTS) -> str:
    """linlora/ops/evidence.json: the newest entry of every kind on every GPU, the oldest run first, one a line.

    Runs on a CPU prove nothing. Raises ValueError for a JSON file that is no run.
    """
    runs = [(Run.load(file), file) for file in sorted(folder.glob("*/*.json"))]
    runs = sorted(((run, file) for run, file in runs if run.architecture), key=lambda pair: pair[0].environment["date"])
    newest: dict[tuple, str] = {}
    for run, file in runs:
        about = {name: run.environment[name] for name in ("gpu", "date", "commit")}
        source = {"architecture": run.architecture, **about, "file": f"bench/results/{file.relative_to(folder)}"}
        for entry in evidence(run.results):
            entry |= source
            key = tuple(entry[name] for name in _KEY)
            newest.pop(key, None)
            newest[key] = json.dumps(entry)
    return "[" + ",".join(f"\n{line}" for line in newest.values()) + "\n]\n"


def evidence(results: list[CaseResult]) -> list[dict[str, object]]:
    """The entries that the results of a GPU run support."""
    entries: list[dict[str, object]] = []
    for backend, op in ((b, op) for b in ("triton", "cuda") for op in OPS):
        if backend == "cuda" and op not in cuda.OPS:
            continue
        ran = [r for r in results if _speaks(r.case, op) and _status(r, backend) not in (None, "unavailable")]
        for dtype, dropout in dict.fromkeys((r.case.dtype, r.case.dropout > 0.0) for r in ran):
            alike = [r for r in ran if (r.case.dtype, r.case.dropout > 0.0) == (dtype, dropout)]
            correct = all(_status(r, backend) == "green" for r in alike)
            for shape in _SHAPES if op in LAYER_OPS else ("any",):
                entries += _entry(op, backend, shape, dtype, dropout, correct, alike)
    return entries


def _entry(
    op: str, backend: str, shape: str, dtype: str, dropout: bool, correct: bool, alike: list[CaseResult]
) -> list[dict[str, object]]:
    """The one entry of a class of shapes; none where nothing of it was timed, or where it was wrong, run."""
    inside = [r for r in alike if _class(r.case) == shape or (shape == "any" and is_large(r.case))]
    speedups = [s for r in inside if (s := r.speedup(f"linlora-{backend}", "linlora-torch")) is not None]
    if not (speedups if correct else inside):
        return []
    return [
        {
            "op": op,
            "backend": backend,
            "shape": shape,
            "dtype": dtype,
            "dropout": dropout,
            "correct": correct,
            "speedup_over_torch": round(geometric_mean(speedups), 4) if correct else 0.0,
            "max_rank": max(r.case.rank for r in inside),
            "cases": len(inside),
        }
    ]


def _status(result: CaseResult, backend: str) -> str | None:
    return getattr(result.outcomes.get(f"linlora-{backend}"), "status", None)


def _class(case: Case) -> str:
    """The class of a call's shape; of a backward too, whose M is that of the forward."""
    return shape_class(case.M, case.N)


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
