"""The cases of the benchmark as a pytest-benchmark suite, grouped by case.

    pytest bench/test_layer.py --benchmark-only
    LINLORA_SUITE=default pytest bench/test_layer.py --benchmark-only -k "peft or linlora"

A provider whose results are wrong fails before anything is timed. Providers run one after the other here; for figures
to quote use `linlora bench`, which lets them take turns. On a GPU a round waits for the device.
"""

from __future__ import annotations

import os

import pytest
import torch
from linlora.bench import gate
from linlora.bench.cases import Case
from linlora.bench.data import random_data
from linlora.bench.measure import synchronize
from linlora.bench.providers import EAGER, Provider
from linlora.bench.suites import select, suite

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = select(suite(os.environ.get("LINLORA_SUITE", "quick")), "bfloat16" if DEVICE.type == "cuda" else None)


@pytest.mark.parametrize("provider", EAGER, ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id.replace(" ", "-"))
def test_layer(benchmark, case: Case, provider: Provider) -> None:
    if (obstacle := provider.obstacle(case, DEVICE)) is not None:
        pytest.skip(obstacle)
    data = random_data(case, DEVICE)
    job = provider.job(case, DEVICE, data)
    errors = gate.errors(job.results(), gate.expected(case, provider.function, data, DEVICE))
    assert gate.verdict(case, errors) is None

    benchmark.group = case.id

    def step() -> None:
        job.step()
        synchronize(DEVICE)

    with job.context():
        benchmark(step)
