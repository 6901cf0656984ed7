"""A miniature of the experiment: every phase, two tasks, one seed, a few seconds."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import linlora.quickstart
from linlora.quickstart import Settings

MINIATURE = Settings(
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=16,
    pretraining_epochs=3,
    rank=2,
    alpha=4,
    steps=15,
    batch=16,
    scalings=(0.0, 0.5, 1.0),
    timed_steps=6,
    warmup_steps=2,
    tasks=("rotated-digit", "mirrored-odd"),
)


@pytest.fixture
def miniature():
    return MINIATURE


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(run directory, results, what was printed) of one finished miniature; not to be written to."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    console = Console(file=io.StringIO(), width=100)
    results = linlora.quickstart.run(out, seeds=1, settings=MINIATURE, console=console, processes=1)
    return out, results, console.file.getvalue()
