"""The look of the benchmark's tables, and the line above them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console

from .results import CaseResult, Run

LOOK: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD, "padding": (0, 1)}


def print_headline(run: Run, what: str, console: Console) -> None:
    """What was run, where, when and with which versions."""
    about = run.environment
    console.print(
        f"\n[bold]linlora {what}[/bold] on {about.get('gpu') or about['cpu']}, {about['date']}, commit "
        f"{str(about['commit'])[:12]}, torch {about['torch']}, triton {about['triton']}, {about['threads']} threads",
        highlight=False,
    )


def shown(results: Iterable[CaseResult], order: Iterable[str]) -> list[str]:
    """The providers that have something to show, time or red, in a given order."""
    seen = {name for result in results for name, outcome in result.outcomes.items() if outcome.status != "unavailable"}
    return [name for name in order if name in seen]


def wide_console() -> Console:
    """Standard output; 120 columns wide where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
