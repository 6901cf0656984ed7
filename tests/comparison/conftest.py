"""A miniature of the comparison on digits: both starts, every control and method, two tasks, one seed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from linlora.comparison import Options, Settings, compare_digits
from linlora.quickstart import Settings as QuickstartSettings

MINIATURE = Settings(
    QuickstartSettings(
        hidden_size=16, layers=1, heads=2, intermediate_size=16, pretraining_epochs=8, rank=2, alpha=4, steps=15,
        batch=16, tasks=("rotated-digit", "mirrored-odd"),
    ),
    Options(
        scalings=(0.0, 0.5, 1.0), ties_keep=(0.5,), ties_scalings=(0.5, 1.0), dare_drop=(0.5,), dare_scalings=(0.3,),
        lorahub_budget=3, adamerging_initial=(0.3,), adamerging_steps=2, negation_scalings=(0.5, 1.0),
        map_scalings=(0.0, 1.0),
    ),
    warmup_steps=5,
)  # fmt: skip


@pytest.fixture
def miniature():
    return MINIATURE


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(run directory, results, what was printed) of one finished miniature; not to be written to."""
    out = tmp_path_factory.mktemp("comparison") / "run"
    console = Console(file=io.StringIO(), width=100)
    results = compare_digits(out, seeds=1, settings=MINIATURE, console=console, processes=1)
    return out, results, console.file.getvalue()
