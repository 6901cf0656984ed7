"""The file of a run, and the pictures and tables made of it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from linlora.bench.cases import Case, attention_case
from linlora.bench.folder import slug
from linlora.bench.plot import plot_run
from linlora.bench.report import losses, print_run
from linlora.bench.results import CaseResult, Outcome, Run
from rich.console import Console

LARGE = Case("q", "llama-3-8b", 8192, 4096, 4096, dtype="bfloat16", form="pair")
SMALL = replace(LARGE, M=16, phase="forward")
RATIOS = {"frozen": 1.0, "linlora-torch": 1.3, "linlora-triton": 1.04, "peft": 1.4, "functorch-all": 2.6}


def green(ratio: float) -> Outcome:
    return Outcome("green", "", {"y": 1e-3}, ratio, ratio, ratio, ratio, 9, 100 * ratio)


def result(case: Case, **changed: Outcome) -> CaseResult:
    outcomes = {name: green(ratio) for name, ratio in RATIOS.items()}
    return CaseResult(case, {**outcomes, **{name.replace("_", "-"): outcome for name, outcome in changed.items()}})


def a_run(*results: CaseResult) -> Run:
    versions = {"commit": "abc", "torch": "2", "triton": "3", "threads": 2}
    about = {"date": "2026-01-02T03:04:05+00:00", "cpu": "a CPU", **versions}
    return Run("gpu", "cuda:0", about, list(results))


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    wrong = Outcome("wrong", "y: rel err inf", {"y": float("inf")})
    run = a_run(result(LARGE), result(SMALL, peft=wrong))
    run.not_run.append("a case")
    run.save(tmp_path / "deep" / "run.json")
    assert Run.load(tmp_path / "deep" / "run.json") == run


def test_a_file_that_is_not_a_run_is_refused_by_name(tmp_path: Path) -> None:
    for text in ("{", "{}", "[]", '{"schema": 99}'):
        (tmp_path / "file.json").write_text(text)
        with pytest.raises(ValueError, match=r"file\.json"):
            Run.load(tmp_path / "file.json")


def test_speedups_and_losses() -> None:
    slow = result(SMALL, linlora_triton=green(1.5), linlora_torch=green(1.6))
    assert slow.speedup("linlora-triton", "functorch-all") == pytest.approx(2.6 / 1.5)
    assert slow.memory("linlora-triton", "peft") == pytest.approx(1.5 / 1.4)
    assert slow.speedup("linlora-triton", "nobody") is None
    (line,) = losses(a_run(result(LARGE), slow))
    assert "linlora-triton is slower than PEFT (0.93x)" in line


def test_the_report_says_what_is_red_and_keeps_its_time_to_itself() -> None:
    wrong = Outcome("wrong", "grad_B: rel err 3.0e-01 > 1e-02", {"y": 1e-3, "grad_B": 0.3})
    console = Console(width=120, record=True, file=io.StringIO())
    print_run(a_run(result(LARGE, peft=wrong)), console)
    text = console.export_text()
    assert "RED" in text
    assert "WRONG (rel err 3e-01)" in " ".join(text.split())
    assert "grad_B: rel err 3.0e-01" in text
    assert "1.04" in text


def test_the_report_gives_attention_and_model_scope_tables_of_their_own() -> None:
    attention = attention_case("llama-3-8b", 4, 32, 4096, 128, causal=True, phase="forward")
    step = replace(LARGE, op="model", scope="model", phase="training_step")
    run = a_run(
        result(LARGE),
        result(
            attention, peft=Outcome("unavailable"), functorch=green(9.0), jvp_flash=Outcome("unavailable", "absent")
        ),
        result(step, linlora_model_torch=green(2.0), functorch=green(5.0)),
    )
    console = Console(width=160, record=True, file=io.StringIO())
    print_run(run, console)
    text = console.export_text()
    assert "attention with tangents, forward: median ms" in text
    assert "training step, model scope: median ms" in text
    for column in ("primal alone", "frozen model", "TFLOP/s", "vs jvp", "mem / jvp"):
        assert column in text
    assert "jvp_flash_attention: absent" in text
    (row,) = [line for line in text.splitlines() if "torch, model scope" in line and "tokens" in line]
    assert "2.50" in row  # times faster than jvp
    assert "0.40" in row  # of its memory
    assert f"{5.0 / 1.04:.2f}" not in text  # layer scope is another function than jvp over the whole model


def test_pictures_are_written(tmp_path: Path) -> None:
    attention = attention_case("llama-3-8b", 4, 32, 4096, 128, causal=True)
    run = a_run(result(LARGE), result(replace(LARGE, rank=64)), result(SMALL), result(attention, jvp_flash=green(40.0)))
    pictures = plot_run(run, tmp_path, "run")
    assert [picture.name for picture in pictures] == ["run-ratios.png", "run-ranks.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_run(a_run(), tmp_path, "run")


def test_results_are_filed_by_gpu() -> None:
    assert slug("NVIDIA H200") == "h200"
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
