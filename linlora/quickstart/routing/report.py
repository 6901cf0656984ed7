"""What the user reads: the table, and sentences computed from its numbers, good or bad."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from linlora.experiments.report import compare, percent, spread
from linlora.quickstart.routing.methods import ADAPTATIONS, INVENTORY_TITLES
from linlora.quickstart.routing.results import paired_difference

# Pairs the reading compares: few numbers against many, an inventory against none, linearized against plain.
_PAIRS = (
    ("mhr-z", "lora"), ("mhr-z", "poly-z"), ("mhr-mu", "lora"), ("mhr-mu", "shared"), ("mhr-mu", "mhr"),
    ("mhr-z-layer", "mhr-z"), ("mhr-z-model", "mhr-z"), ("mhr-mu-layer", "mhr-mu"), ("mhr-mu-model", "mhr-mu"),
)  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    """Accuracies on the test split in %, mean ± standard deviation over seeds; seconds are medians over tasks."""
    shots, seeds = results["settings"]["shots"], results["seeds"]
    over_seeds = f"mean ± std over {seeds} seeds" if seeds > 1 else "one seed"
    view = Table(
        title=f"Test accuracy in %, mean of {len(results['held_out'])} held-out tasks, {over_seeds}",
        caption="trained: how many parameters; s: to adapt to one task with the most images",
    )
    view.add_column("", no_wrap=True)
    for header in ("trained", *(f"{count} images" for count in shots), "s"):
        view.add_column(header, justify="right", no_wrap=True)
    before = percent(sum(results["before"]) / len(results["before"]))
    view.add_row("before adaptation", "0", *[before] * len(shots), "–")
    for name, method in ADAPTATIONS.items():
        entries = [results["methods"][name][str(count)] for count in shots]
        seconds = f"{entries[-1]['seconds']:.2f}" if method.trains != "nothing" else "–"
        view.add_row(
            method.title, f"{entries[0]['parameters']:,}", *(spread(entry["test"]) for entry in entries), seconds
        )
    return view


def reading(results: dict[str, Any]) -> str:
    """Sentences computed from the numbers. A difference smaller than its own deviation is not called one."""
    lines = [f"The inventories, on validation images of the {len(results['trained'])} tasks they were trained on:"]
    lines += [
        f"  {INVENTORY_TITLES[name]} {spread(entry['validation'])} %, {entry['parameters']:,} parameters, "
        f"{entry['seconds']:.0f} s"
        for name, entry in results["inventories"].items()
    ]
    for count in results["settings"]["shots"]:
        verdicts = (
            compare(ADAPTATIONS[one].title, ADAPTATIONS[other].title, paired_difference(results, one, other, count))
            for one, other in _PAIRS
        )
        lines += [f"With {count} images:", *(f"  {verdict}" for verdict in verdicts)]
    return "\n".join(lines)
