"""Neighbours of the table's rows as candidates: the one that wins is launched with exactly what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest
import torch
from fake_gpu import FakeKernels, Wrong, entry
from linlora.bench import tuning
from linlora.bench.tuning_neighbours import configurations, provider_of
from linlora.kernels.configs import Config
from linlora.kernels.launch import Launch

import linlora
from linlora import functional, kernels
from linlora.ops import backends, evidence
from linlora.ops.evidence import Call, Candidate, Entry
from linlora.ops.neighbours import OPS, Neighbour, backend_of

CPU = torch.device("cpu")
CALL = Call("linearized_lora_linear", (32, 16, 24), "float16", 4)
STAGES, WARPS = "triton num_stages+1", "triton num_warps*2"


@pytest.fixture
def gpu(tmp_path):
    with FakeKernels(tmp_path) as played:
        yield played


@pytest.fixture
def launched(monkeypatch):
    """The configurations of what is launched."""
    configs, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, device: (configs.append(self.config), run(self, device))[1])
    return configs


def layer(call, dtype=torch.float16):
    (m, k, n), r = call.size, call.rank
    x, weight, A0, dB = (0.1 * torch.randn(*of, dtype=dtype) for of in ((m, k), (n, k), (r, k), (n, r)))
    return x.requires_grad_(), weight, None, A0, None, None, dB.requires_grad_(), 2.0


def test_a_neighbour_that_wins_is_chosen_named_and_launched(gpu, monkeypatch, launched):
    gpu.times[STAGES], gpu.times[WARPS] = (40e-6, 20e-6), (45e-6, 20e-6)
    made = tuning.measure(CALL, CPU)
    assert made.ranking == [STAGES, WARPS, "triton"]
    row = made.candidates["triton"].config
    won = made.candidates[STAGES].config
    assert asdict(won) == asdict(row) | {"num_stages": row.num_stages + 1}
    evidence.add([made])
    gpu.again()  # as the next process finds it
    monkeypatch.setitem(backends._MODULES, STAGES, Neighbour("num_stages+1"))
    y = functional.linearized_lora_linear(*layer(CALL))
    assert launched == [won]
    y.backward(torch.ones_like(y))
    assert launched[:2] == [won, won]  # then the gradients of the factors, which have no neighbours
    explained = linlora.explain(CALL.op, "cpu", shape=CALL.size, rank=4, dtype=torch.float16)
    assert explained.backend == "triton"
    assert explained.reasons["triton"].startswith(
        f"chosen automatically: 2.50x composed torch by {won} (num_stages+1), {CALL}"
    )


def test_a_wrong_neighbour_is_never_chosen_however_fast(gpu, monkeypatch, capsys):
    gpu.times[STAGES] = (1e-6, 1e-6)
    monkeypatch.setitem(backends._MODULES, STAGES, Wrong(1.5))
    made = tuning.measure(CALL, CPU)
    assert made.candidates[STAGES].status == "wrong"
    assert made.ranking == ["triton"]
    assert f"{STAGES} ({made.candidates[STAGES].config}) is left out: " in capsys.readouterr().err


def test_a_neighbour_that_does_not_compile_is_left_out_with_a_line(gpu, monkeypatch, capsys):
    class Large(Wrong):
        def lora_linear(self, *_, **__):
            raise RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448")

    monkeypatch.setitem(backends._MODULES, STAGES, Large(1.0))
    gpu.times[WARPS] = (40e-6, 20e-6)
    made = tuning.measure(CALL, CPU)
    assert (made.candidates[STAGES].status, made.ranking) == ("failed", [WARPS, "triton"])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "left out" in line)
    assert line.startswith(
        f"linlora: {CALL}: {STAGES} ({made.candidates[STAGES].config}) is left out: RuntimeError: out"
    )


def test_a_tie_with_its_row_is_not_worth_a_change(gpu):
    gpu.times[STAGES] = (49.5e-6, 20e-6)
    assert tuning.measure(CALL, CPU).ranking == ["triton"]


def test_neighbours_of_a_row_that_is_far_behind_or_wrong_are_not_timed(gpu, monkeypatch):
    gpu.times["triton"] = (200e-6, 20e-6)
    assert set(tuning.measure(CALL, CPU).candidates) == {"torch", "triton", "cuda"}
    gpu.times["triton"] = (10e-6, 5e-6)
    monkeypatch.setitem(backends._MODULES, "triton", Wrong(1.5))
    assert set(tuning.measure(CALL, CPU).candidates) == {"torch", "triton", "cuda"}


def test_neighbours_stand_in_for_a_row_that_does_not_compile(gpu, monkeypatch):
    class Large(Wrong):
        def lora_linear(self, *_, **__):
            raise RuntimeError("out of resource")

    monkeypatch.setitem(backends._MODULES, "triton", Large(1.0))
    assert tuning.measure(CALL, CPU).ranking[0].startswith("triton ")


def test_a_neighbour_that_breaks_the_gpu_loses_nothing_that_was_known(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "_broke", lambda result, device, of: STAGES if STAGES in of else None)
    with pytest.raises(tuning.TuneError, match=re.escape(f"the {STAGES} kernel broke")):
        tuning.measure(CALL, CPU)
    gpu.again()
    (kept,) = evidence.own_entries(None)
    assert kept.ranking == ["triton"]
    assert kept.verdict(STAGES) == "failed (broke the GPU's context)"


def test_an_entry_names_its_configurations_and_is_read_back():
    config = Config("flags", 64, 128, 64, 64, num_warps=4, num_stages=5)
    made = entry(CALL, triton=1.2)
    made.candidates[STAGES] = Candidate("green", error=1e-3, microseconds=(50.0,), config=config)
    again = Entry.parse(json.loads(json.dumps(made.as_json())))
    assert (again, again.candidates[STAGES].config) == (made, config)
    assert again.best("triton") == STAGES
    assert again.best("cuda") == "cuda"
    assert again.verdict(STAGES) == "2.00x composed torch by 64x128x64x64 w4 s5 g8 (num_stages+1)"


@pytest.mark.parametrize("op", OPS)
def test_configurations_are_those_of_the_launch(op, launched):
    call = Call(op, (2, 16, 1) if op == "attention" else (32, 16, 16), "float16", 4)
    for name, config in list(configurations(call, CPU).items())[:3]:
        launched.clear()
        with linlora.use_backend(name):
            provider_of(name).job(next(tuning.cases_of(call)), CPU).step()
        assert launched == [config]


def test_names_of_backends():
    assert [backend_of(name) for name in backends._MODULES] == ["torch", "triton", "cuda"] + ["triton"] * 8
    assert Neighbour("block_n/2").norm is kernels.norm


def test_compiled_code_launches_the_neighbour(gpu, monkeypatch, launched):
    """What torch.compile makes of a call has the change among the arguments of its operator."""
    gpu.times[STAGES] = (40e-6, 20e-6)
    made = tuning.measure(CALL, CPU)
    evidence.add([made])
    monkeypatch.setitem(backends._MODULES, STAGES, Neighbour("num_stages+1"))
    arguments = layer(CALL)
    expected = functional.linearized_lora_linear(*arguments)
    launched.clear()
    compiled = torch.compile(functional.linearized_lora_linear, fullgraph=True, backend="aot_eager")
    y = compiled(*arguments)
    assert launched == [made.candidates[STAGES].config]
    torch.testing.assert_close(y, expected)
