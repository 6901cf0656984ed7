"""Worker processes: they compute what this process computes, their errors arrive here, and they end with it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from linlora import TaskVector
from linlora.quickstart import run
from linlora.quickstart.experiment import open_experiment
from linlora.quickstart.finetune import fine_tune
from linlora.quickstart.workers import crew_of

MANY_SEEDS = """
import signal, sys
from pathlib import Path
from linlora.quickstart import Settings, run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start its background jobs deaf to Ctrl-C
run(Path(sys.argv[1]), seeds=50, settings=Settings(**eval(sys.argv[2])), processes=2)
"""


def test_a_worker_writes_the_same_adapter_and_its_errors_arrive(tmp_path, finished, miniature):
    out = tmp_path / "run"
    shutil.copytree(finished[0] / "backbone", out / "backbone")
    experiment = open_experiment(miniature, out, "cpu")
    job = ("model", "mirrored-odd", 0)
    with pytest.raises(KeyError, match="colour"), crew_of(2, experiment) as crew:  # noqa: PT012
        assert list(crew(fine_tune, [job])) == [job]
        list(crew(fine_tune, [("lora", "colour", 0)]))
    file = "adapters/model/mirrored-odd/seed0/task_vector.safetensors"
    here, there = TaskVector.load(finished[0] / file), TaskVector.load(out / file)
    assert all(torch.equal(here.deltas[name], there.deltas[name]) for name in here.deltas)


def test_ctrl_c_ends_the_workers_too_and_a_later_call_goes_on(tmp_path, finished, miniature, console, patience):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "adapters")
    shutil.rmtree(out / "fused")
    main = subprocess.Popen(
        [sys.executable, "-u", "-c", MANY_SEEDS, out, repr(dataclasses.asdict(miniature))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    printed = ""
    while "trained" not in printed:
        line = main.stdout.readline()
        assert line, f"the run ended by itself:\n{printed}"
        printed += line
    os.killpg(main.pid, signal.SIGINT)  # as a terminal does, to every process
    printed = main.communicate(timeout=patience)[0]  # until no process holds the other end
    assert main.returncode != 0
    assert "SpawnProcess" not in printed, "the main process is interrupted; its workers end without a word"

    results = run(out, seeds=1, settings=miniature, console=console, processes=1)
    assert results["adapters_found_from_earlier_call"] > 0
    assert results["families"] == finished[1]["families"]
