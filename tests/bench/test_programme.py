"""The performance programme: what it measures, how it continues, what it says of the results."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from linlora.bench import gate, graphs, heatmaps, variants
from linlora.bench.cases import Case, layer_case
from linlora.bench.cli import app
from linlora.bench.data import random_layer
from linlora.bench.goals import GOALS
from linlora.bench.grid import programme
from linlora.bench.programme_report import print_programme
from linlora.bench.results import CaseResult, Outcome, Run
from rich.console import Console
from typer.testing import CliRunner

TINY = ["programme", "--suite", "quick", "--device", "cpu", "--case", "tiny", "--seconds", "2"]
RATIOS = {"frozen": 1.0, "linlora-torch": 1.2, "linlora-triton": 1.1, "linlora-cuda": 1.02, "cuda-sm80": 1.3}


@pytest.fixture(autouse=True)
def _at_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINLORA_COMMIT", "abc")


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def a_run(*cases: Case, **ratios: float) -> Run:
    def outcome(ratio: float) -> Outcome:
        return Outcome("green", "", {"y": 1e-3}, ratio, ratio, ratio, ratio, 9, host_ms=0.02, roofline=0.8 / ratio)

    named = RATIOS | {name.replace("_", "-"): ratio for name, ratio in ratios.items()}
    versions = {"commit": "abc", "torch": "2", "triton": "3", "threads": 2}
    about = {"date": "2026-01-02T03:04:05+00:00", "gpu": "NVIDIA H200", **versions}
    results = [CaseResult(case, {name: outcome(ratio) for name, ratio in named.items()}) for case in cases]
    return Run("programme", "cuda:0", about, "sm_90", results)


def printed(run: Run) -> str:
    console = Console(width=170, record=True, file=io.StringIO())
    print_programme(run, console)
    return console.export_text()


def test_it_reaches_every_goal_every_rank_and_few_rows() -> None:
    cases = programme()
    assert len(cases) == len({case.id for case in cases})
    assert all(any(goal.about(case) for case in cases) for goal in GOALS)
    assert {case.M for case in cases if case.M <= 64} == {1, 2, 4, 8, 16, 32, 64}
    assert {case.rank for case in cases} == {4, 16, 64, 128}
    assert {"forward", "input_gradient", "forward_backward"} == {case.phase for case in cases}
    assert any(case.dropout for case in cases)


def test_it_measures_saves_draws_and_continues(tmp_path: Path) -> None:
    first = invoke(*TINY, "--case", "forward_backward", "--out", str(tmp_path))
    assert first.exit_code == 0, first.output
    assert "time over F.linear" in first.output
    assert (tmp_path / "programme-linlora-torch.png").read_bytes().startswith(b"\x89PNG")
    before = Run.load(tmp_path / "programme.json")
    second = invoke(*TINY, "--out", str(tmp_path))
    assert second.exit_code == 0, second.output
    after = Run.load(tmp_path / "programme.json")
    assert after.results[: len(before.results)] == before.results
    assert len(after.results) == len(before.results) + 1
    assert f"{len(after.results)} of {len(after.results)} cases" in second.output


def test_a_run_of_another_commit_is_not_continued(tmp_path: Path) -> None:
    invoke(*TINY, "--out", str(tmp_path))
    file = tmp_path / "programme.json"
    content = json.loads(file.read_text())
    content["environment"]["torch"] = "1.0"
    file.write_text(json.dumps(content))
    refused = invoke(*TINY, "--out", str(tmp_path))
    assert refused.exit_code == 2
    said = " ".join(refused.output.replace("│", " ").split())
    assert "torch 1.0 →" in said
    assert "--fresh" in said
    assert invoke(*TINY, "--fresh", "--out", str(tmp_path)).exit_code == 0


def test_the_report_names_the_best_its_share_of_cublas_and_the_backend_that_follows() -> None:
    main = layer_case("llama-3-8b", "q", 8192, "pair", "forward")
    main = replace(main, dtype="bfloat16")
    text = printed(a_run(main, replace(main, M=16)))
    row = next(line for line in text.splitlines() if "8192×4096×4096" in line and "pair" in line)
    assert row.split()[-3:] == ["cuda", "98", "78"]
    assert "linearized_lora_linear   large    bfloat16   no" in text
    assert "µs of the host" in text
    (goal,) = [line for line in text.splitlines() if "forward, R = 2r = 32" in line]
    assert "met: 1.020" in goal


def test_goals_are_met_missed_or_not_measured() -> None:
    main = replace(layer_case("llama-3-8b", "q", 8192, "pair", "forward"), dtype="bfloat16")
    goal = next(goal for goal in GOALS if goal.about(main))
    assert goal.verdict(a_run(main).results).startswith("met: 1.020")
    assert goal.verdict(a_run(main, linlora_cuda=1.2).results).startswith("MISSED: 1.100")  # triton's, the better one
    assert goal.verdict([]) == "not measured"


def test_a_wrong_result_is_red_and_ends_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "verdict", lambda *_: "y: rel err 1e0")
    outcome = invoke(*TINY, "--out", str(tmp_path))
    assert outcome.exit_code == 1
    assert "RED" in outcome.output


def test_heat_maps_hold_every_shape_and_rank(tmp_path: Path) -> None:
    run = a_run(*(replace(case, dtype="bfloat16") for case in programme()[:12]))
    names = {picture.name for picture in heatmaps.draw(run, tmp_path, "programme")}
    assert names == {f"programme-{name}.png" for name in RATIOS if name != "frozen"}


@pytest.mark.parametrize("phase", ["forward", "input_gradient"])
@pytest.mark.parametrize(
    ("kernel", "form"),
    [
        *product(("recompute", "flags"), ("short", "pair")),  # Triton has one design of the op with two streams
        *product((80, 90), ("short", "pair", "dual")),
    ],
)
def test_a_kernel_by_itself_computes_its_case(
    device: str, request: pytest.FixtureRequest, kernel: str | int, form: str, phase: str
) -> None:
    place = torch.device(device)
    op = "lora_linear" if form == "dual" else "linearized_lora_linear"
    case = Case("q", "tiny", 72, 64, 48, 8, "float16", "short" if form == "short" else "pair", phase, op, bias=True)
    if isinstance(kernel, int):
        request.getfixturevalue("cuda_kernels")
    data = random_layer(case, place)
    job = variants.triton(case, data, kernel) if isinstance(kernel, str) else variants.csrc(case, data, kernel)
    expected = gate.expected(case, "linearized", data, place)
    assert gate.verdict(case, gate.errors(job.results(), expected)) is None


def test_a_design_that_a_case_has_not_is_said_to_be_missing(device: str) -> None:
    case = Case("q", "tiny", 4, 64, 48, 8, "float16", phase="forward")
    with pytest.raises(NotImplementedError, match="flags"):
        variants.triton(case, random_layer(case, torch.device(device)), "flags")


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_training_step_that_graphs_capture_trains(scope: str) -> None:
    trained, again = (graphs.train(8, 16, scope, 0.0, torch.device("cpu"), captured=False) for _ in range(2))
    assert trained["loss"].isfinite().all()
    assert trained["parameter 0"].any()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
