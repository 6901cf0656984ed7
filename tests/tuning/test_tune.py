"""`linlora tune` on a GPU that the CPU plays: what is wrong is never chosen, what is measured is never lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeKernels, Wrong, entry
from linlora.bench import gate, tuning
from typer.testing import CliRunner

import linlora
from linlora.cli import app
from linlora.ops import backends, evidence
from linlora.ops.evidence import Call
from linlora.testing import tiny_model

CPU = torch.device("cpu")
CALL = Call("lora_linear", (32, 16, 24), "float16", 4)
LAYER = CALL._replace(op="linearized_lora_linear")


@pytest.fixture
def gpu(tmp_path):
    with FakeKernels(tmp_path) as played:
        yield played


@pytest.fixture
def few(monkeypatch):
    """A grid of two calls."""
    monkeypatch.setattr(tuning, "grid", lambda ranks, dtype: [CALL._replace(dtype=dtype), LAYER._replace(dtype=dtype)])


def invoke(*arguments):
    return CliRunner().invoke(app, ["tune", "--dtype", "float16", *map(str, arguments)])


def test_a_wrong_kernel_is_never_chosen_however_fast(gpu):
    made = tuning.measure(LAYER, CPU)
    assert made.candidates["cuda"].status == "wrong"
    assert "rel err 5" in made.candidates["cuda"].detail
    assert made.speedup("cuda") is None
    assert (made.ranking, made.speedup("triton")) == (["triton"], pytest.approx(2.0))
    assert (made.over("F.linear", "triton"), made.over("PEFT", "triton")) == (pytest.approx(1.0), pytest.approx(1.0))
    assert len(made.cases) == 4
    evidence.add([made])
    assert backends.automatic(None, LAYER.op, (32, 16, 32), torch.float16, 16) == "triton"


def test_the_host_counts_where_it_is_slower_than_the_device(gpu):
    gpu.times["triton"] = (10e-6, 300e-6)
    assert tuning.measure(CALL, CPU).ranking == []


def test_memory_that_a_kernel_does_not_write_is_not_a_number(gpu, monkeypatch):
    class Forgetful(Wrong):
        def lora_linear(self, problem, save=True, primal=True):
            result = super().lora_linear(problem, save, primal)
            y = torch.empty_like(result.y_tangent)
            y[1:] = result.y_tangent[1:]
            return result._replace(y_tangent=y)

    monkeypatch.setitem(backends._MODULES, "triton", Forgetful(1.0))
    assert tuning.measure(CALL, CPU).candidates["triton"].status == "wrong"
    with gate.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_random_state_of_the_caller_stays(gpu):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tuning.measure(LAYER, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("op", [op for op in backends.OPS if op != "factor_gradients"])
def test_every_op_has_cases_that_are_checked(gpu, op):
    size = (8, 16, 2) if op == "attention" else (16, 16, 16)
    made = tuning.measure(Call(op, size, "float32", 4 if "lora" in op else 0, dropout=op == "lora_linear"), CPU)
    assert (made.candidates["torch"].status, made.candidates["triton"].status) == ("green", "green")
    assert len(made.candidates["torch"].microseconds) == len(made.cases) > 1


def test_the_grid_decides_the_layers_of_real_models_and_is_without_repeats():
    calls = tuning.grid([16, 64], "bfloat16")
    assert len(calls) == len(set(calls))
    assert {call.op for call in calls} == set(backends.OPS) - {"factor_gradients"}
    for size in ((8192, 4096, 14336), (4096, 3584, 3584), (12608, 768, 3072), (512, 1024, 1024), (32, 4096, 1024)):
        asked = Call("linearized_lora_linear", size, "bfloat16", 16)
        assert min(asked.distance(call) for call in calls) <= evidence.REACH


def test_the_command_measures_prints_keeps_and_exports(gpu, few, tmp_path):
    done = invoke("--export", tmp_path / "runs" / "h200.json")
    assert done.exit_code == 0, done.output
    (row,) = [line for line in done.output.splitlines() if str(LAYER) in line]
    assert row.split()[-5:] == ["2.00", "WRONG", "1.00", "1.00", "triton"]
    assert len(list(gpu.cache.rglob("*.json"))) == 2
    exported = json.loads((tmp_path / "runs" / "h200.json").read_text())
    assert {entry["call"]["op"] for entry in exported["entries"]} == {CALL.op, LAYER.op}
    assert "commit" in exported["environment"]


def test_what_was_measured_is_not_measured_again(gpu, few, monkeypatch):
    invoke()
    gpu.again()
    measure, measured = tuning.measure, []
    monkeypatch.setattr(tuning, "measure", lambda *call: (measured.append(call[0]), measure(*call))[1])
    assert invoke().exit_code == 0
    assert measured == []
    invoke("--fresh")
    assert measured == [CALL, LAYER]


@pytest.mark.parametrize("seconds", ["1e-9", "0"])
def test_out_of_time_the_rest_is_left(gpu, few, seconds):
    done = invoke("--seconds", seconds)
    assert done.exit_code == 0
    assert "2 of 2 calls are left" in done.output


def test_an_interruption_keeps_and_prints_what_is_done(gpu, few, monkeypatch):
    measure = tuning.measure

    def interrupted(call, device):
        if call == LAYER:
            raise KeyboardInterrupt
        return measure(call, device)

    monkeypatch.setattr(tuning, "measure", interrupted)
    done = invoke()
    assert done.exit_code == 130
    assert str(CALL) in done.output
    assert "what was measured is kept" in done.output
    assert len(list(gpu.cache.rglob("*.json"))) == 1


def test_a_candidate_that_breaks_the_gpu_is_noted_and_never_tried_again(gpu, few, monkeypatch):
    monkeypatch.setattr(tuning, "_broke", lambda *_: "cuda")
    done = invoke()
    assert done.exit_code == 2
    assert "the cuda kernel broke the GPU's context" in " ".join(done.output.split())
    gpu.again()
    (kept,) = evidence.own_entries(None)
    assert (kept.ranking, kept.verdict("cuda")) == ([], "failed (broke the GPU's context)")
    assert evidence.is_measured(CALL, None)


def test_a_failed_launch_on_a_live_gpu_breaks_nothing(gpu, monkeypatch):
    class Failing(Wrong):
        def lora_linear(self, *_, **__):
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setitem(backends._MODULES, "triton", Failing(1.0))
    made = tuning.measure(CALL, CPU)
    assert made.verdict("triton") == "failed (RuntimeError: out of resource: shared memory)"
    assert made.candidates["torch"].status == "green"


def worker(folder: Path, *arguments: str, pause: float) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder), "tune", "--dtype", "float16"]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PAUSE": str(pause)},
    )  # fmt: skip


def test_killed_half_way_two_processes_continue_where_it_was_and_measure_every_call_once(gpu, tmp_path, patience):
    killed = worker(tmp_path, pause=0.0)
    for _ in range(2):  # one is kept by now
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=patience)
    gpu.again()
    kept = len(evidence.own_entries(None))
    assert 1 <= kept < 4
    both = [worker(tmp_path, pause=0.2) for _ in range(2)]
    said = [process.communicate(timeout=patience) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(out.count("measuring") for out, _ in said) == 4 - kept
    gpu.again()
    assert len(evidence.own_entries(None)) == 4


def test_a_cache_that_cannot_be_written_is_said_and_the_rest_goes_on(gpu, few, tmp_path):
    gpu.cache.parent.mkdir()
    gpu.cache.write_text("a file where the folder would be")
    done = invoke("--export", tmp_path / "h200.json")
    assert done.exit_code == 0, done.output
    assert "cannot be written" in done.output
    assert len(json.loads((tmp_path / "h200.json").read_text())["entries"]) == 2


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = invoke()
    assert done.exit_code == 2
    assert "torch sees none: without one there is nothing to tune" in " ".join(done.output.split())


def test_the_layers_of_a_model_are_read_from_its_config(gpu, tmp_path):
    tiny_model("llama").base_model.model.config.save_pretrained(tmp_path / "llama")
    calls = tuning.calls_of_layers(str(tmp_path / "llama"), 128, [8], "float16")
    assert {call.size for call in calls} == {(128, 32, 32), (128, 32, 16), (128, 32, 48), (128, 48, 32)}
    assert {call.op for call in calls} == {"linearized_lora_linear", "lora_linear"}


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_model_is_tuned_on_the_calls_it_makes_and_runs_on_what_is_chosen(gpu, scope):
    model = tiny_model("bert")
    linlora.linearize(model, scope)
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    found = linlora.tune(model, batch)
    ops = {made.call.op for made in found.entries}
    assert ops >= ({"lora_linear", "attention", "layer_norm"} if scope == "model" else {"linearized_lora_linear"})
    assert all(made.ranking == ["triton"] for made in found.entries)
    assert "Times faster than composed torch" in str(found)
    assert set(backends._decided.values()) <= {"triton"}
    model(**batch)
    assert set(backends._decided.values()) == {"triton"}


@pytest.mark.parametrize("rank", [0, 1])
def test_what_keeps_rank_0_from_measuring_is_told_to_those_who_wait(gpu, monkeypatch, rank):
    def broken(*_):
        raise tuning.TuneError("the triton kernel broke the GPU's context")

    told = [tuning.TuneError("rank 0: the triton kernel broke the GPU's context")]
    sent = []
    monkeypatch.setattr(tuning, "measure_all", broken)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    monkeypatch.setattr(
        "torch.distributed.broadcast_object_list",
        lambda made, src: sent.extend(made) if rank == 0 else made.__setitem__(0, told[0]),
    )
    with pytest.raises(tuning.TuneError, match="broke the GPU's context"):
        linlora.tune(torch.nn.Linear(2, 2), torch.ones(1, 2))
    assert rank == 1 or list(map(str, sent)) == list(map(str, told))


def test_a_file_of_bench_results_enters_the_packages_table(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "RESULTS", tmp_path / "results")
    evidence.add([entry(CALL, triton=1.3)])
    assert tuning.export(tmp_path / "results" / "h200" / "a.json", CPU) == 1
    gpu.again()
    assert [made.call for made in evidence.shipped()] == [CALL]
    evidence.add([entry(CALL, date="2026-02-01", triton=1.4), entry(LAYER, triton=1.1)])
    tuning.export(tmp_path / "results" / "h200" / "b.json", CPU)
    gpu.again()
    speedups = {made.call: made.speedup("triton") for made in evidence.shipped()}
    assert speedups == {CALL: pytest.approx(1.4), LAYER: pytest.approx(1.1)}


def test_the_packages_table_is_that_of_the_results():
    assert evidence.TABLE.read_text() == tuning.table(tuning.RESULTS), "bench/results/ has changed: export again"


def test_a_machine_without_a_gpu_is_told_that_nothing_is_to_be_tuned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        tuning.TuneError, match="on a CUDA GPU, and torch sees none: without one there is nothing to tune"
    ):
        tuning.this_gpu()
