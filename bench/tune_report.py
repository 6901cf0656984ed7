"""What tuning found, as a table: a row a call."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from linlora.ops.evidence import Entry

from .tables import LOOK


def text(entries: Iterable[Entry]) -> str:
    """The table in 120 columns."""
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(tuning_table(entries))
    return console.export_text()


def tuning_table(entries: Iterable[Entry]) -> Table:
    """Every candidate's speed-up over composed torch, and the time of the chosen one over F.linear and PEFT."""
    table = Table(title="Times faster than composed torch in the worst case, and what is chosen", **LOOK)
    table.add_column("call", no_wrap=True)
    for name in ("triton", "cuda", "over F.linear", "over PEFT"):
        table.add_column(name, justify="right")
    table.add_column("chosen")
    for entry in entries:
        chosen = next(iter(entry.ranking), "torch")
        over = (entry.over(peer, chosen) for peer in ("F.linear", "PEFT"))
        cells = [_outcome(entry, name) for name in ("triton", "cuda")]
        table.add_row(str(entry.call), *cells, *("–" if of is None else f"{of:.2f}" for of in over), chosen)
    return table


def _outcome(entry: Entry, name: str) -> str:
    name = entry.best(name)
    of, speedup = entry.candidates.get(name), entry.speedup(name)
    if speedup is not None:
        return f"{speedup:.2f}"
    return "–" if of is None or of.status in ("unavailable", "green") else f"[red]{of.status.upper()}[/red]"
