"""A miniature experiment on digits: both starts, every control and method, step times; two tasks, one seed."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from linlora import quickstart
from linlora.experiments import Options
from linlora.quickstart.digits import Digits

MINIATURE = replace(
    quickstart.CONTROLS,
    data=Digits(
        hidden_size=16, layers=1, heads=2, intermediate_size=16, pretraining_epochs=3,
        tasks=("rotated-digit", "mirrored-odd"),
    ),
    options=Options(
        scalings=(0.0, 0.5, 1.0), ties_keep=(0.5,), ties_scalings=(0.5, 1.0), dare_drop=(0.5,), dare_scalings=(0.3,),
        lorahub_budget=3, adamerging_initial=(0.3,), adamerging_steps=2, weights_scalings=(0.5, 1.0),
        regmean_examples=64, soup_examples=16, soup_epochs=1, negation_scalings=(0.5, 1.0), map_scalings=(0.0, 1.0),
    ),
    kept=("average", "task_arithmetic"), rank=2, alpha=4, steps=15, batch=16, warmup_steps=5, timed_steps=6,
    untimed_steps=2,
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
    out = tmp_path_factory.mktemp("experiment") / "run"
    console = Console(file=io.StringIO(), width=100)
    results = quickstart.run(out, seeds=1, settings=MINIATURE, console=console, workers=1)
    return out, results, console.file.getvalue()
