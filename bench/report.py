"""The run on the terminal: times, what linlora gains on whom, and where it loses."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .providers import COMPILED, EAGER, FLOOR, PROVIDERS, Provider
from .results import CaseResult, Outcome, Run
from .tables import LOOK, print_headline, shown

_OURS = [provider for provider in EAGER if provider.backend is not None]
_PEERS = {
    "functorch-all": "jvp all", "functorch-ab": "jvp A,B", "functorch": "jvp", "jvp-flash": "jvp_flash",
    "peft": "PEFT", "addmm": "addmm", "poly": "Poly", "peft-loop": "loop",
}  # fmt: skip
_MEMORY_PEERS = {"peft": "PEFT", "functorch": "jvp", "poly": "Poly"}


def print_run(run: Run, console: Console) -> None:
    """Everything there is to say about a run, in 120 columns."""
    print_headline(run, f"bench, suite {run.suite},", console)
    for group in dict.fromkeys(result.case.group for result in run.results):
        results = [result for result in run.results if result.case.group == group]
        console.print(_times(group, results))
        console.print(_gains(results))
    compiled = [result for result in run.results if any(p.name in result.outcomes for p in COMPILED)]
    if compiled:
        console.print(_times("torch.compile", compiled, compiled_only=True))
    for line in _footnotes(run):
        console.print(line, highlight=False, soft_wrap=True)


def _times(title: str, results: list[CaseResult], compiled_only: bool = False) -> Table:
    table = Table(title=f"{title}: median ms", **LOOK)
    table.add_column("case", no_wrap=True)
    table.add_column("form", no_wrap=True)
    table.add_column("r", justify="right")
    names = shown(results, [p.name for p in (COMPILED if compiled_only else EAGER)])
    for name in names:
        table.add_column(_heading(PROVIDERS[name], results[0]), justify="right")
    for result in results:
        cells = [_time(result.outcomes.get(name)) for name in names]
        table.add_row(result.case.title, result.case.variant, _rank(result), *cells)
    return table


def _heading(provider: Provider, result: CaseResult) -> str:
    if provider is FLOOR:
        return {"stream": "primal alone", "model": "frozen model"}.get(result.case.kind, "frozen layer")
    return provider.label.replace(" compiled", "")


def _rank(result: CaseResult) -> str:
    return str(result.case.rank or "")


def _gains(results: list[CaseResult]) -> Table:
    """Times over the floor, speed-ups and memory: a column for every peer that has a time in these results."""
    table = Table(title="linlora: times faster than a peer, and memory over the peer's", **LOOK)
    timed = {name for result in results for name, outcome in result.outcomes.items() if outcome.ratio is not None}
    peers = {name: label for name, label in _PEERS.items() if name in timed}
    memory_peers = {name: label for name, label in _MEMORY_PEERS.items() if name in timed}
    attention = results[0].case.op == "attention"
    table.add_column("case", no_wrap=True)
    table.add_column("form", no_wrap=True)
    table.add_column("r", justify="right")
    table.add_column("backend", no_wrap=True)
    table.add_column("/ floor", justify="right")
    for label in peers.values():
        table.add_column(f"vs {label}", justify="right")
    for label in memory_peers.values():
        table.add_column(f"mem / {label}", justify="right")
    with_roofline = any(o.roofline for result in results for o in result.outcomes.values())
    with_cublas = with_roofline and results[0].case.kind in ("layer", "routing")
    for column, wanted in (("TFLOP/s", attention), ("% cuBLAS", with_cublas), ("% roof", with_roofline)):
        if wanted:
            table.add_column(column, justify="right")
    for result in results:
        for provider in _OURS:
            outcome = result.outcomes.get(provider.name)
            if outcome is None or outcome.ratio is None:
                continue
            cells = [_times_over(outcome.ratio, plain=True)]
            cells += [_times_over(_speedup(result, provider, peer)) for peer in peers]
            cells += [_times_over(result.memory(provider.name, peer), plain=True) for peer in memory_peers]
            if attention:
                cells += [_three_digits(result.tflops(provider.name) or 0.0)]
            if with_cublas:
                cells += [f"{100 / outcome.ratio:.0f}"]
            if with_roofline:
                cells += [f"{100 * outcome.roofline:.0f}" if outcome.roofline else "-"]
            name = provider.label.removeprefix("linlora ")
            table.add_row(result.case.title, result.case.variant, _rank(result), name, *cells)
    return table


def _speedup(result: CaseResult, ours: Provider, peer: str) -> float | None:
    """Of linlora over a peer that computes the same, or plain LoRA: layer scope is no match for jvp over a model."""
    if result.case.kind == "model" and PROVIDERS[peer].function not in (ours.function, "plain"):
        return None
    return result.speedup(ours.name, peer)


def losses(run: Run) -> list[str]:
    """The cases in which linlora's best backend is slower than a peer (or than its own torch backend), in words."""
    lines = []
    for result in run.results:
        best = min(
            (p for p in _ours(result) if getattr(result.outcomes.get(p.name), "ratio", None) is not None),
            key=lambda provider: result.outcomes[provider.name].ratio or 0.0,
            default=None,
        )
        if best is None:
            continue
        slower = [
            f"{label} ({speedup:.2f}x)"
            for peer, label in _PEERS.items()
            if (speedup := _speedup(result, best, peer)) is not None and speedup < 0.995
        ]
        if slower:
            lines.append(f"{result.case.id}: {best.name} is slower than {', '.join(slower)}")
    return lines


def _ours(result: CaseResult) -> list[Provider]:
    """linlora's providers of the function the case is about."""
    network = result.case.scope == "model"
    return [provider for provider in _OURS if (provider.function == "network") == network]


def _footnotes(run: Run) -> Iterable[str]:
    yield "\nRatios are medians over rounds of times in the same round: above 1, linlora is faster than the peer."
    yield "short: linearized at B0 = 0, where PEFT starts; pair: at B0 ≠ 0; dual: two streams, primal and tangent."
    if any(result.case.kind == "routing" for result in run.results):
        yield (
            "routed: every example has the factors of its task, mixed in the step. There PEFT LoRA is one adapter for "
            "all rows, and the loop has an adapter a task, mixed before."
        )
    if any(result.case.op == "attention" for result in run.results):
        yield "TFLOP/s of attention count six products forward and five backward, half of each when causal."
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
        if outcome.status == "unavailable"
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
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1
    return f"{value:.{digits}f}"


def _times_over(value: float | None, plain: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{value:.2f}"
    return text if plain or value >= 1.0 else f"[red]{text}[/red]"
