"""The ops of model scope in the benchmark: every provider computes them, and the absent ones say why."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from linlora.bench import gate, streams
from linlora.bench.cases import Case, attention_case, stream_case
from linlora.bench.data import random_data
from linlora.bench.floors import flops, least_bytes
from linlora.bench.job import LayerJob
from linlora.bench.providers import EAGER, PROVIDERS, Provider
from linlora.bench.runner import run_case
from linlora.bench.sanitize import cases as sanitized
from linlora.bench.suites import suite
from torch.nn.functional import scaled_dot_product_attention

from linlora.ops.backends import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ATTENTION = attention_case("test", 2, 3, 40, 16, causal=True)
CASES = [
    replace(case, phase=phase)
    for case in (
        ATTENTION,
        attention_case("test", 1, 2, 33, 8, causal=False),
        *(
            stream_case("test", op, op, 12, 24, 16)
            for op in ("linear", "layer_norm", "rms_norm", "activation", "gated_activation")
        ),
    )
    for phase in ("forward", "forward_backward")
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
def test_every_provider_computes_the_op_and_the_gradient_of_its_primal(case: Case, provider: Provider) -> None:
    data = random_data(case, DEVICE)
    expected = gate.expected(case, provider.function, data, DEVICE)
    assert ("y_tangent" in expected) == (provider is not PROVIDERS["frozen"])
    assert any(name.startswith("grad_") for name in expected) == (case.phase == "forward_backward")
    assert gate.verdict(case, gate.errors(provider.job(case, DEVICE, data).results(), expected)) is None


def test_attention_is_timed_against_jvp_and_the_primal_alone() -> None:
    result = run_case(ATTENTION, list(EAGER), DEVICE, seconds=0.1)
    timed = {name for name, outcome in result.outcomes.items() if outcome.median_ms is not None}
    assert {"frozen", "linlora-torch", "functorch"} <= timed
    assert result.tflops("linlora-torch") > 0
    assert "peft" not in result.outcomes


def test_the_package_jvp_flash_attention_says_why_it_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = PROVIDERS["jvp-flash"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "GPU only" in str(peer.obstacle(ATTENTION, torch.device("cpu")))
    assert "pip install jvp_flash_attention" in str(peer.obstacle(ATTENTION, torch.device("cuda")))


def test_the_package_jvp_flash_attention_is_called_with_dual_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fwd_dual(q, k, v, causal):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    package = ModuleType("jvp_flash_attention.jvp_attention")
    package.JVPAttn = SimpleNamespace(fwd_dual=fwd_dual)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", ModuleType("jvp_flash_attention"))
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", package)
    data = random_data(ATTENTION, DEVICE)
    job = LayerJob(streams.jvp_flash(data), data, ATTENTION.phase)
    expected = gate.expected(ATTENTION, "network", data, DEVICE)
    assert {"y", "y_tangent", "grad_q", "grad_k", "grad_v"} == expected.keys()
    assert gate.verdict(ATTENTION, gate.errors(job.results(), expected)) is None


def test_a_peer_that_runs_out_of_memory_is_not_red_but_linlora_is() -> None:
    def too_large(data):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    names = ("functorch", "linlora-torch")
    broken = [replace(PROVIDERS[name], stream=too_large) for name in names]
    outcomes = run_case(ATTENTION, [PROVIDERS["frozen"], *broken], DEVICE, seconds=0.1).outcomes
    assert [outcomes[name].status for name in names] == ["unavailable", "failed"]


def test_attention_counts_six_products_forward_and_five_backward() -> None:
    product = 2 * 2 * 3 * 40 * 40 * 16 // 2  # causal
    assert flops(ATTENTION) == 11 * product
    assert flops(replace(ATTENTION, phase="forward")) == 6 * product
    assert flops(replace(ATTENTION, phase="forward", causal=False)) == 12 * product


def test_a_norm_moves_both_streams_forward_and_three_tensors_backward() -> None:
    norm = stream_case("test", "rms_norm", "rms_norm", 8, 4, 4)
    assert least_bytes(replace(norm, phase="forward")) == 4 * (4 * 32 + 4)
    assert least_bytes(norm) == 4 * (7 * 32 + 4)


def test_the_gpu_suite_and_the_sanitizer_reach_every_op() -> None:
    measured = {case.op for case in suite("gpu")}
    assert set(OPS) - {"factor_gradients"} <= measured  # factor gradients run in the backward of a layer
    assert set(OPS) - {"factor_gradients"} <= {case.op for case in sanitized(1)}
