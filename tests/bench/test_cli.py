"""`linlora bench` from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from linlora.bench.cli import app
from linlora.bench.results import Run
from typer.testing import CliRunner

QUICK = ["--suite", "quick", "--device", "cpu", "--case", "tiny", "--case", "forward_backward", "--seconds", "2"]


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_without_a_subcommand_it_runs_saves_and_can_be_plotted(tmp_path: Path) -> None:
    outcome = invoke(*QUICK, "--provider", "linlora-torch", "--provider", "peft", "--out", str(tmp_path))
    assert outcome.exit_code == 0, outcome.output
    assert "vs PEFT" in outcome.output
    (file,) = tmp_path.glob("*.json")
    assert Run.load(file).results[0].outcomes["linlora-torch"].ratio is not None
    plotted = invoke("plot", str(file))
    assert plotted.exit_code == 0, plotted.output
    assert (tmp_path / f"{file.stem}-ratios.png").exists()


def test_a_second_run_does_not_overwrite_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        invoke("run", *QUICK, "--provider", "linlora-torch", "--out", str(tmp_path))
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_list_prints_ids() -> None:
    outcome = invoke("list", "--suite", "quick", "--rank", "8")
    assert outcome.exit_code == 0
    assert "tiny linear 4x8x8 r8 short forward float32" in outcome.output.splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "nightly"], "unknown suite"),
        (["--provider", "unsloth"], "unknown provider"),
        (["--device", "tpu9"], "not a device"),
        (["--dtype", "int8"], "int8"),
        (["--case", "no-such-layer"], "no case"),
        (["plot", "missing.json"], "does not exist"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], said: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert said in " ".join(outcome.output.replace("│", " ").split())


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = invoke("--device", "cuda")
    assert outcome.exit_code == 2
    assert "no CUDA GPU" in outcome.output


def test_a_run_that_is_interrupted_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("linlora.bench.runner.run", interrupt)
    outcome = invoke(*QUICK, "--out", str(tmp_path))
    assert outcome.exit_code == 130
    assert "interrupted; no case was measured yet" in outcome.output


def test_the_pytest_benchmark_suite_runs(patience: float) -> None:
    suite = Path(__file__).parents[2] / "bench" / "test_layer.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", str(suite)]
    command += ["-k", "tiny and (linlora or peft)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
