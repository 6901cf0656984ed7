"""Mixed batches in the benchmark: every provider computes what it says, on every kind of batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linlora.bench import gate, routing
from linlora.bench.cases import Case, routing_case
from linlora.bench.data import random_data, tasks_of_batch
from linlora.bench.floors import flops, least_bytes
from linlora.bench.providers import EAGER, PROVIDERS, Provider
from linlora.bench.report import print_run
from linlora.bench.results import Run
from linlora.bench.runner import run_case
from rich.console import Console

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def small(batch: int, length: int, tasks: int, tasks_in="uniform", **changes) -> Case:
    case = routing_case("tiny", "linear", batch, length, tasks, tasks_in)
    return replace(case, **{"K": 24, "N": 16, "rank": 4, **changes})


CASES = [
    small(6, 5, 3),
    small(8, 40, 4, "skewed", heads=4),
    small(16, 2, 8, "skewed"),  # of which one task has no example
    small(5, 1, 5, "distinct", bias=True),
    small(4, 3, 1, phase="forward"),
]


@pytest.mark.parametrize(
    ("case", "provider"),
    [
        pytest.param(case, provider, id=f"{case.id.replace(' ', '-')}-{provider.name}")
        for case in CASES
        for provider in EAGER
        if provider.obstacle(case, DEVICE) is None
    ],
)
def test_every_provider_computes_the_layer_and_its_gradients(case: Case, provider: Provider) -> None:
    data = random_data(case, DEVICE)
    expected = gate.expected(case, provider.function, data, DEVICE)
    assert any(name.startswith("grad_") for name in expected) == (case.phase == "forward_backward")
    assert gate.verdict(case, gate.errors(provider.job(case, DEVICE, data).results(), expected)) is None


def test_routing_is_measured_against_poly_a_loop_and_one_adapter() -> None:
    result = run_case(CASES[0], list(EAGER), DEVICE, seconds=0.2)
    timed = {name for name, outcome in result.outcomes.items() if outcome.median_ms is not None}
    assert {"frozen", "linlora-torch", "poly", "peft-loop", "peft"} <= timed
    console = Console(record=True, width=200)
    print_run(Run("routing", str(DEVICE), _environment(), [result], []), console)
    text = console.export_text()
    assert "mixed batches of tasks, forward + backward" in text
    assert "vs Poly" in text
    assert "vs loop" in text


def _environment() -> dict:
    versions = {"commit": "0" * 40, "torch": "2", "triton": "3", "threads": 1}
    return {"gpu": None, "cpu": "a CPU", "date": "2026-01-01", **versions}


def test_batches_are_uniform_skewed_or_of_distinct_tasks() -> None:
    counts = {
        kind: torch.bincount(tasks_of_batch(small(64, 1, 8, kind))).tolist() for kind in ("uniform", "skewed")
    }  # fmt: skip
    assert counts == {"uniform": [8] * 8, "skewed": [32, 16, 8, 4, 2, 1, 0, 1]}
    assert sorted(tasks_of_batch(small(64, 1, 0, "distinct")).tolist()) == list(range(64))


def test_one_task_is_one_adapter() -> None:
    case = small(6, 5, 1)
    data = random_data(case, DEVICE)
    assert data is not None
    routed, one = (gate.expected(case, function, data, DEVICE)["y"] for function in ("routed", "plain"))
    torch.testing.assert_close(routed, one, atol=1e-5, rtol=1e-5)


def test_the_update_is_as_large_as_the_frozen_product() -> None:
    case = routing_case("flan-t5-base", "q", 16, 4, 8)
    data = random_data(case, DEVICE)
    y, frozen = (gate.expected(case, function, data, DEVICE)["y"] for function in ("routed", "frozen"))
    assert 0.2 < ((y - frozen).norm() / frozen.norm()).item() < 5


def test_flops_and_bytes_count_mixing_once_a_task() -> None:
    case = small(6, 5, 3)
    M, K, N, r, S, T = case.M, case.K, case.N, case.rank, 8, 3
    mixing, low = 2 * T * S * r * (K + N), 2 * M * r * (K + N)
    assert flops(replace(case, phase="forward")) == 2 * M * K * N + low + mixing
    assert flops(case) == 4 * M * K * N + 3 * low + 3 * mixing
    assert least_bytes(replace(case, phase="forward")) == 4 * (M * (K + N) + K * N + S * r * (K + N))


def test_the_peers_mix_as_linlora_does() -> None:
    case = small(6, 5, 3, heads=2)
    data = random_data(case, DEVICE)
    poly = routing.poly(data)
    assert poly.trainable["Z"].shape == (3, 2 * 8)
    torch.testing.assert_close(
        routing.mixture(data.Z, case).sum(-1), torch.ones(3, 2, device=DEVICE), atol=1e-5, rtol=1e-5
    )
    results = PROVIDERS["poly"].job(case, DEVICE, data).results()
    assert set(results) == {"y", "grad_x", "grad_A", "grad_B", "grad_Z"}
