"""A call that nothing is known of: a sentence, once, or a measurement there and then."""

import subprocess

import pytest
import torch
from fake_gpu import FakeKernels, entry
from typer.testing import CliRunner

from linlora.cli import app
from linlora.ops import backends, evidence, first_use
from linlora.ops.evidence import Call

CALL = Call("linear", (16, 16, 16), "float16")


@pytest.fixture
def gpu(tmp_path):
    first_use._say.cache_clear()
    with FakeKernels(tmp_path) as played:
        yield played


def chosen(op="linear", rows=16):
    return backends.select(torch.device("cpu"), op, (rows, 16, 16), torch.float16)


@pytest.fixture
def children(monkeypatch):
    """The processes that were started, each run here."""
    started, real = [], subprocess.run

    def run(command, env=None, **options):
        if env is None:
            return real(command, **options)
        started.append((command, env))
        done = CliRunner().invoke(app, command[3:], env={**env, "LINLORA_TUNE": ""})
        return subprocess.CompletedProcess(command, done.exit_code, done.output, done.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    return started


def test_a_gpu_without_evidence_says_so_once(gpu, capsys):
    for op in ("linear", "rms_norm"):
        assert chosen(op) is backends._MODULES["torch"]
    said = capsys.readouterr().err
    assert said == (
        "linlora: no kernel is proven on this NVIDIA H200 yet, so composed torch runs; `linlora tune` checks and times "
        "the kernels\n"
    )


def test_where_there_is_evidence_and_on_other_ranks_nothing_is_said(gpu, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    chosen()
    monkeypatch.delenv("RANK")
    evidence.add([entry(CALL, triton=1.3)])
    chosen("rms_norm")
    assert capsys.readouterr().err == ""


def test_the_first_use_measures_the_call_and_takes_what_is_proven(gpu, children, monkeypatch):
    monkeypatch.setenv("LINLORA_TUNE", "first-use")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    for _ in range(2):
        assert chosen() is backends._MODULES["triton"]
    ((command, env),) = children
    assert command[1:4] == ["-m", "linlora.cli", "tune"]
    assert (env["CUDA_VISIBLE_DEVICES"], "LINLORA_TUNE" in env) == ("3", False)
    gpu.again()
    assert chosen() is backends._MODULES["triton"]
    assert len(children) == 1


def test_a_measurement_that_fails_is_said_and_composed_torch_runs(gpu, monkeypatch, capsys):
    monkeypatch.setenv("LINLORA_TUNE", "first-use")
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nOutOfMemoryError: 3 GiB")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert chosen() is backends._MODULES["torch"]
    assert "could not be measured, so composed torch runs it: OutOfMemoryError: 3 GiB" in capsys.readouterr().err


def test_another_value_is_refused(gpu, monkeypatch):
    monkeypatch.setenv("LINLORA_TUNE", "always")
    with pytest.raises(ValueError, match="'first-use'"):
        chosen()
