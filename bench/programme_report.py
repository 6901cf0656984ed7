"""The performance programme on the terminal: times over the floor, small M, the backends that follow, the goals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .evidence import evidence
from .goals import GOALS
from .providers import EAGER, FLOOR, PROVIDERS, VARIANTS
from .results import CaseResult, Outcome, Run
from .tables import LOOK, print_headline, shown

_OURS = [*(p.name for p in EAGER if p.backend and p.name.count("-") == 1), *(p.name for p in VARIANTS)]


def print_programme(run: Run, console: Console) -> None:
    """Everything that has been measured so far, in 120 columns where the providers are few."""
    print_headline(run, "performance programme", console)
    results = [result for result in run.results if result.outcomes.get(FLOOR.name, Outcome("failed")).ratio is not None]
    for group in dict.fromkeys(result.case.group for result in results):
        console.print(_ratios(group, [result for result in results if result.case.group == group]))
    small = [r for r in results if r.case.M <= 64 and r.case.phase == "forward"]
    if small:
        console.print(_latency(small))
    console.print(_dispatch(run.results))
    goals = Table("goal (bfloat16, H200)", "at most", "", title="Goals: time over F.linear", **LOOK)
    for goal in GOALS:
        goals.add_row(goal.title, f"{goal.ratio:.2f}", goal.verdict(results))
    console.print(goals)
    for case, name, outcome in run.red:
        console.print(f"[bold red]RED[/bold red] {case.id}: {name} {outcome.status}: {escape(outcome.detail)}")
    for line in _not_measured(run):
        console.print(line, highlight=False, soft_wrap=True)


def _not_measured(run: Run) -> Iterable[str]:
    """Why providers have no time, a line a reason."""
    reasons: dict[str, dict[str, None]] = {}
    for result in run.results:
        for name, outcome in result.outcomes.items():
            if outcome.status == "unavailable":
                reasons.setdefault(escape(outcome.detail), {})[_label(name)] = None
    if reasons:
        yield "Not measured"
        yield from (f"  {', '.join(labels)}: {reason}" for reason, labels in reasons.items())


def _ratios(group: str, results: list[CaseResult]) -> Table:
    """Time over F.linear of every way of running a case, and what the best makes of cuBLAS and of the data sheet."""
    table = Table(title=f"{group}: time over F.linear (frozen layer)", **LOOK)
    names = shown(results, _OURS)
    for column in ("case", "form", "r"):
        table.add_column(column, no_wrap=column == "case", justify="right" if column == "r" else "left")
    table.add_column("F.linear µs", justify="right")
    for name in names:
        table.add_column(_label(name), justify="right")
    table.add_column("best")
    gpu = any(outcome.roofline for result in results for outcome in result.outcomes.values())
    for column in ("% cuBLAS", "% roof") if gpu else ():
        table.add_column(column, justify="right")
    for result in results:
        ratios = {
            name: o.ratio for name in names if (o := result.outcomes.get(name)) is not None and o.ratio is not None
        }
        cells = [f"{ratios[name]:.3f}" if name in ratios else _status(result.outcomes.get(name)) for name in names]
        if ratios:
            best = min(ratios, key=ratios.__getitem__)
            roof = result.outcomes[best].roofline
            cells += [_label(best), f"{100 / ratios[best]:.0f}", f"{100 * roof:.0f}" if roof else "-"][
                : 3 if gpu else 1
            ]
        floor = result.outcomes[FLOOR.name].median_ms
        case = result.case
        table.add_row(case.title, case.variant, str(case.rank), _micro(floor), *cells)
    return table


def _latency(results: list[CaseResult]) -> Table:
    """What a call of few rows costs: on the device, and (host) what queueing it costs the host."""
    table = Table(title="M ≤ 64, forward: µs of the device / µs of the host, a call", **LOOK)
    names = [FLOOR.name, *shown(results, _OURS)]
    table.add_column("case", no_wrap=True)
    table.add_column("form")
    for name in names:
        table.add_column("F.linear" if name == FLOOR.name else _label(name), justify="right")
    for result in sorted(results, key=lambda r: (r.case.layer.rsplit(" ", 1)[0], r.case.variant, r.case.M)):
        outcomes = [result.outcomes.get(name) for name in names]
        cells = [
            f"{_micro(o.median_ms)} / {_micro(o.host_ms)}" if o is not None and o.median_ms else "-" for o in outcomes
        ]
        table.add_row(result.case.title, result.case.variant, *cells)
    return table


def _dispatch(results: Iterable[CaseResult]) -> Table:
    """The backend that `auto` picks by these results on this GPU: `linlora.ops.evidence` reads the same entries."""
    table = Table(
        "op",
        "shapes",
        "dtype",
        "dropout",
        "ranks to",
        "triton",
        "cuda",
        "auto",
        title="The backends that follow: times faster than composed torch",
        **LOOK,
    )
    rows: dict[tuple, dict[str, dict[str, Any]]] = {}
    for entry in evidence(list(results)):
        rows.setdefault(tuple(entry[key] for key in ("op", "shape", "dtype", "dropout")), {})[str(entry["backend"])] = (
            entry
        )
    for (op, shape, dtype, dropout), entries in rows.items():
        speeds = {name: entry["speedup_over_torch"] if entry["correct"] else 0.0 for name, entry in entries.items()}
        best = max(speeds, key=speeds.__getitem__)
        cells = [
            f"{speeds[name]:.2f}" if speeds.get(name) else "[red]wrong[/red]" if name in speeds else "-"
            for name in ("triton", "cuda")
        ]
        ranks = max(entry["max_rank"] for entry in entries.values())
        table.add_row(
            op, shape, dtype, "yes" if dropout else "no", str(ranks), *cells, best if speeds[best] > 1.0 else "torch"
        )
    if not rows:
        table.add_row("nothing has been proven: no kernel was timed", *[""] * 7)
    return table


def _label(name: str) -> str:
    return PROVIDERS[name].label.removeprefix("linlora ")


def _status(outcome: Outcome | None) -> str:
    return (
        "-" if outcome is None or outcome.status in ("unavailable", "green") else f"[red]{outcome.status.upper()}[/red]"
    )


def _micro(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{1e3 * milliseconds:.1f}"
