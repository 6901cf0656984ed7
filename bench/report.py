"""The run on the terminal: times, what linlora gains on whom, and where it loses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .providers import COMPILED, EAGER, PROVIDERS
from .results import CaseResult, Outcome, Run

_PHASES = {"forward": "forward", "forward_backward": "forward + backward", "training_step": "training step"}
_OURS = [provider for provider in EAGER if provider.backend is not None]
_LOOK: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "padding": (0, 1)}
_PEERS = {"functorch-all": "jvp all", "functorch-ab": "jvp A,B", "peft": "PEFT", "addmm": "addmm"}


def print_run(run: Run, console: Console) -> None:
    """Everything there is to say about a run, in 120 columns."""
    about = run.environment
    console.print(
        f"\n[bold]linlora bench[/bold] suite {run.suite} on {about.get('gpu') or about['cpu']}, {about['date']}, "
        f"commit {str(about['commit'])[:12]}, torch {about['torch']}, {about['threads']} threads",
        highlight=False,
    )
    for phase in _PHASES:
        results = [result for result in run.results if result.case.phase == phase]
        if results:
            console.print(_times(phase, results))
            console.print(_gains(results))
    compiled = [result for result in run.results if any(p.name in result.outcomes for p in COMPILED)]
    if compiled:
        console.print(_times("compiled", compiled, compiled_only=True))
    for line in _footnotes(run):
        console.print(line, highlight=False, soft_wrap=True)


def _times(phase: str, results: list[CaseResult], compiled_only: bool = False) -> Table:
    title = "torch.compile" if compiled_only else _PHASES[phase]
    table = Table(title=f"{title}: median ms", **_LOOK)
    table.add_column("case", no_wrap=True)
    table.add_column("form", no_wrap=True)
    table.add_column("r", justify="right")
    shown = _timed_providers(results, [p.name for p in (COMPILED if compiled_only else EAGER)])
    for name in shown:
        table.add_column(PROVIDERS[name].label.replace(" compiled", ""), justify="right")
    for result in results:
        cells = [_time(result.outcomes.get(name)) for name in shown]
        table.add_row(result.case.title, result.case.variant, str(result.case.rank), *cells)
    return table


def _gains(results: list[CaseResult]) -> Table:
    table = Table(title="linlora: times faster than, and memory over PEFT's", **_LOOK)
    table.add_column("case", no_wrap=True)
    table.add_column("form", no_wrap=True)
    table.add_column("r", justify="right")
    table.add_column("backend", no_wrap=True)
    table.add_column("/ floor", justify="right")
    for label in _PEERS.values():
        table.add_column(f"vs {label}", justify="right")
    table.add_column("memory", justify="right")
    with_roofline = any(o.roofline for result in results for o in result.outcomes.values())
    if with_roofline:
        table.add_column("% cuBLAS", justify="right")
        table.add_column("% roof", justify="right")
    for result in results:
        for provider in _OURS:
            outcome = result.outcomes.get(provider.name)
            if outcome is None or outcome.ratio is None:
                continue
            cells = [_times_over(outcome.ratio, plain=True)]
            cells += [_times_over(result.speedup(provider.name, peer)) for peer in _PEERS]
            cells += [_times_over(result.memory(provider.name, "peft"), plain=True)]
            if with_roofline:
                cells += [f"{100 / outcome.ratio:.0f}", f"{100 * outcome.roofline:.0f}" if outcome.roofline else "-"]
            table.add_row(result.case.title, result.case.variant, str(result.case.rank), str(provider.backend), *cells)
    return table


def losses(run: Run) -> list[str]:
    """The cases in which linlora's best backend is slower than a peer (or than its own torch backend), in words."""
    lines = []
    for result in run.results:
        best = min(
            (p.name for p in _OURS if getattr(result.outcomes.get(p.name), "ratio", None) is not None),
            key=lambda name: result.outcomes[name].ratio or 0.0,
            default=None,
        )
        if best is None:
            continue
        slower = [
            f"{label} ({speedup:.2f}x)"
            for peer, label in _PEERS.items()
            if (speedup := result.speedup(best, peer)) is not None and speedup < 0.995
        ]
        if slower:
            lines.append(f"{result.case.id}: {best} is slower than {', '.join(slower)}")
    return lines


def _footnotes(run: Run) -> Iterable[str]:
    yield "\nRatios are medians over rounds of times in the same round: above 1, linlora is faster than the peer."
    yield "short: linearized at B0 = 0, where PEFT starts; pair: at B0 ≠ 0; dual: two streams, primal and tangent."
    cores, load = run.environment.get("cores"), run.environment.get("load")
    if cores and load and load > 0.25 * cores:
        yield f"[yellow]The machine was busy before the run (load {load}, {cores} cores): times are noisy.[/yellow]"
    host_bound = [r.case.id for r in run.results if any((o.starved or 0) > 0.5 for o in r.outcomes.values())]
    if host_bound:
        yield f"[yellow]The GPU waited for the host in: {'; '.join(host_bound)}.[/yellow]"
    if lost := losses(run):
        yield "\n[bold]Where linlora loses[/bold]"
        yield from (f"  {line}" for line in lost)
    if run.not_run:
        yield f"\n[yellow]Not run, out of time (raise --seconds): {'; '.join(run.not_run)}[/yellow]"
    missing = {
        f"  {PROVIDERS[name].label}: {escape(outcome.detail)}"
        for result in run.results
        for name, outcome in result.outcomes.items()
        if outcome.status == "unavailable" and result.case.op == "linearized_lora_linear"
    }
    if missing:
        yield "\nNot measured"
        yield from sorted(missing)
    red = list(run.red)
    if red:
        yield "\n[bold red]RED: no time for these[/bold red]"
        yield from (f"  {case.id}: {name} {o.status}: {escape(o.detail)}" for case, name, o in red)
    else:
        yield "\n[green]Every result that is timed passed the correctness gate before and after.[/green]"


def _timed_providers(results: list[CaseResult], order: list[str]) -> list[str]:
    """The providers that have something to show, time or red, in a stable order."""
    seen = {name for result in results for name, outcome in result.outcomes.items() if outcome.status != "unavailable"}
    return [name for name in order if name in seen]


def _time(outcome: Outcome | None) -> str:
    if outcome is None or outcome.status == "unavailable":
        return "-"
    if outcome.status == "wrong":
        return f"[red]WRONG (rel err {max(outcome.errors.values()):.0e})[/red]"
    if outcome.status == "failed":
        return "[red]FAILED[/red]"
    if outcome.median_ms is None:
        return "-"
    return _three_digits(outcome.median_ms)


def _three_digits(value: float) -> str:
    return (
        f"{value:.4f}"
        if value < 0.1
        else f"{value:.3f}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
    )


def _times_over(value: float | None, plain: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{value:.2f}"
    return text if plain or value >= 1.0 else f"[red]{text}[/red]"
