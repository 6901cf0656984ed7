"""The evidence in runs, and the table of it that the library reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from linlora.bench.cases import Case, attention_case, stream_case
from linlora.bench.evidence import evidence, table
from linlora.bench.results import CaseResult, Outcome, Run

from linlora.ops.evidence import TABLE, Entry

LARGE = Case("q", "llama-3-8b", 8192, 4096, 4096, dtype="bfloat16", form="pair")
SMALL = replace(LARGE, M=16, phase="forward")
RATIOS = {"frozen": 1.0, "linlora-torch": 1.3, "linlora-triton": 1.04, "peft": 1.4, "functorch-all": 2.6}


def green(ratio: float) -> Outcome:
    return Outcome("green", "", {"y": 1e-3}, ratio, ratio, ratio, ratio, 9, 100 * ratio)


def result(case: Case, **changed: Outcome) -> CaseResult:
    outcomes = {name: green(ratio) for name, ratio in RATIOS.items()}
    return CaseResult(case, {**outcomes, **{name.replace("_", "-"): outcome for name, outcome in changed.items()}})


def a_run(*results: CaseResult, architecture: str | None = "sm_90") -> Run:
    versions = {"commit": "abc", "torch": "2", "triton": "3", "threads": 2}
    about = {"date": "2026-01-02T03:04:05+00:00", "cpu": "a CPU", **versions}
    return Run("gpu", "cuda:0", about, architecture, list(results))


def test_green_and_faster_is_evidence() -> None:
    entries = evidence([result(LARGE), result(replace(LARGE, rank=64)), result(SMALL)])
    assert {(entry["op"], entry["shape"]) for entry in entries} == {
        ("linearized_lora_linear", "large"), ("linearized_lora_linear", "small"), ("factor_gradients", "any"),
    }  # fmt: skip
    for entry in entries:
        assert (entry["backend"], entry["dtype"], entry["dropout"], entry["correct"]) == (
            "triton",
            "bfloat16",
            False,
            True,
        )
        assert entry["speedup_over_torch"] == pytest.approx(1.3 / 1.04, abs=1e-4)
    (large,) = [entry for entry in entries if entry["shape"] == "large"]
    assert (large["cases"], large["max_rank"]) == (2, 64)


def test_one_red_case_takes_the_evidence_of_its_op() -> None:
    red = result(SMALL, linlora_triton=Outcome("wrong", "y: rel err 1e0"))
    entries = evidence([result(LARGE), red])
    assert {entry["op"]: entry["correct"] for entry in entries} == {
        "linearized_lora_linear": False, "factor_gradients": True,
    }  # fmt: skip
    failed = evidence([result(LARGE, linlora_triton=Outcome("failed", "out of resources"))])
    assert [entry["correct"] for entry in failed] == [False, False]


def test_another_dtype_and_dropout_have_evidence_of_their_own() -> None:
    red = Outcome("wrong", "y: rel err 1e0")
    results = [
        result(LARGE),
        result(replace(LARGE, dtype="float32"), linlora_triton=red),
        result(replace(LARGE, dropout=0.1), linlora_triton=red),
    ]
    found = {(e["dtype"], e["dropout"]): e["correct"] for e in evidence(results) if e["op"] == "linearized_lora_linear"}
    assert found == {("bfloat16", False): True, ("float32", False): False, ("bfloat16", True): False}


def test_the_cuda_kernels_have_evidence_for_the_ops_they_have() -> None:
    entries = evidence([result(LARGE, linlora_cuda=green(1.0))])
    assert [entry["op"] for entry in entries if entry["backend"] == "cuda"] == ["linearized_lora_linear"]


def test_what_was_not_timed_in_a_class_is_no_evidence_of_it() -> None:
    assert {entry["shape"] for entry in evidence([result(SMALL)])} == {"small"}
    untimed = result(LARGE, linlora_triton=Outcome("green"))
    assert evidence([untimed]) == []


def test_an_op_of_model_scope_has_evidence_of_its_own() -> None:
    causal, full = (attention_case("llama-3-8b", 4, 32, 4096, 128, causal) for causal in (True, False))
    norm = stream_case("llama-3-8b", "rms_norm", "rms_norm", 8192, 4096, 4096)
    assert [entry["op"] for entry in evidence([result(causal), result(norm)])] == ["attention", "rms_norm"]
    red = result(full, linlora_triton=Outcome("wrong", "y: rel err 1e0"))
    found = {entry["op"]: entry["correct"] for entry in evidence([result(causal), red, result(norm)])}
    assert found == {"attention": False, "rms_norm": True}
    assert evidence([result(attention_case("llama-3-8b", 1, 2, 128, 64, False))]) == []


def test_the_dual_op_has_evidence_of_its_own() -> None:
    dual = replace(LARGE, op="lora_linear")
    assert [entry["op"] for entry in evidence([result(dual)])] == ["lora_linear"]


def test_the_table_that_the_library_reads_is_that_of_the_runs() -> None:
    assert TABLE.read_text() == table(), "bench/results/ has changed: run `linlora bench evidence`"


def test_the_table_has_the_newest_word_on_every_gpu(tmp_path: Path) -> None:
    runs = (("a", "2026-01-03", "H200", 1.0), ("b", "2026-01-01", "H200", 1.1), ("c", "2026-01-02", "H100", 1.2))
    for name, date, gpu, ratio in runs:
        run = a_run(result(replace(LARGE, phase="forward"), linlora_triton=green(ratio)))
        run.environment.update(date=date, gpu=gpu)
        run.save(tmp_path / gpu / f"{name}.json")
    a_run(result(LARGE), architecture=None).save(tmp_path / "cpu" / "run.json")
    entries = [Entry(**entry) for entry in json.loads(table(tmp_path))]
    assert [(entry.gpu, entry.date, entry.file) for entry in entries] == [
        ("H100", "2026-01-02", "bench/results/H100/c.json"), ("H200", "2026-01-03", "bench/results/H200/a.json"),
    ]  # fmt: skip
    assert [entry.speedup_over_torch for entry in entries] == pytest.approx([1.3 / 1.2, 1.3], abs=1e-4)


def test_the_table_of_no_run_on_a_gpu_is_empty(tmp_path: Path) -> None:
    assert json.loads(table(tmp_path)) == []
