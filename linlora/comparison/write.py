"""The files of a finished comparison, and what is printed."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from linlora.comparison.figures import draw_all
from linlora.comparison.report import markdown, reading, tables
from linlora.storage.files import write_text
from linlora.storage.run_directory import write_json

_OUTPUTS = {
    "results.json": "every number, by control, method, seed and task, with options, settings and environment",
    "table.txt": "the tables; table.md the same for a README",
    "scores.png": "normalised scores of every method and control",
    "scalings.png": "validation score against the scaling of task arithmetic",
    "cosines.png": "cosines between what is added",
    "disentanglement.png": "how often two fused tasks answer otherwise than alone",
    "adapters/": "every task vector",
}


def write_report(results: Mapping[str, Any], out: Path, console: Console) -> None:
    write_json(out / "results.json", dict(results))
    write_text(out / "table.md", markdown(results))
    draw_all(results, out)
    file = StringIO()
    for place in (console, Console(file=file, width=120)):
        for table in tables(results):
            place.print(table)
        place.print(reading(results), highlight=False)
    write_text(out / "table.txt", file.getvalue())
    console.print(f"\n{results['wall_seconds']:.0f} s. Written to {out}:", highlight=False)
    for name, what in _OUTPUTS.items():
        if (out / name).exists():
            console.print(f"  {name:20s} {what}", highlight=False)
