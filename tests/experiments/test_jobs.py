"""Jobs: done once, again if what they read is new, in worker processes that end with the main one."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from distributed import LocalCluster
from rich.console import Console

from linlora.experiments.jobs import Job, run_jobs

ENDLESS = """
import signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from rich.console import Console
from test_jobs import job
from linlora.experiments.jobs import run_jobs

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start its background jobs deaf to Ctrl-C
    run_jobs([[job(Path(sys.argv[1]), str(i), seconds=0.2) for i in range(1000)]], 2, console=Console())
"""


def job(place, name, after=(), text="{}", seconds=0.0):
    function = functools.partial(write, place / name, text, seconds)
    return Job(f"wrote {name}", place / name, ("found.json",), function, tuple(place / other for other in after))


def write(folder, text, seconds):
    import time

    time.sleep(seconds)
    if text == "fail":
        raise KeyError("colour")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "found.json").write_text(text)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def wrote(console):
    return [line for line in console.file.getvalue().splitlines() if line.startswith("wrote")]


def test_a_job_is_done_once_and_again_if_what_it_reads_is_new(tmp_path, console):
    phases = [[job(tmp_path, "a"), job(tmp_path, "b")], [job(tmp_path, "c", after=["a"])], [job(tmp_path, "d")]]
    assert run_jobs(phases, 1, console=console).made == 4
    (tmp_path / "a" / "found.json").write_text("{")
    done = run_jobs(phases, 1, console=console)
    assert (done.made, done.found) == (2, 2)
    assert wrote(console)[4:] == ["wrote a", "wrote c"]


def test_a_job_that_was_to_be_done_again_is_not_found_done_after_an_interruption(tmp_path, console):
    def phases(text):
        return [[job(tmp_path, "a", text=text)], [job(tmp_path, "b", after=["a"], text=text)]]

    run_jobs(phases('{"run": 1}'), 1, console=console)
    (tmp_path / "a" / "found.json").write_text("{")
    interrupted = [[job(tmp_path, "a", text='{"run": 2}')], [job(tmp_path, "b", after=["a"], text="fail")]]
    with pytest.raises(KeyError):
        run_jobs(interrupted, 1, console=console)
    run_jobs(phases('{"run": 3}'), 1, console=console)
    assert [json.loads((tmp_path / name / "found.json").read_text())["run"] for name in "ab"] == [2, 3]


def test_workers_do_what_this_process_does_and_their_errors_arrive(tmp_path, console):
    run_jobs([[job(tmp_path, name, text=json.dumps({"is": name})) for name in "abc"]], 2, console=console)
    assert [json.loads((tmp_path / name / "found.json").read_text())["is"] for name in "abc"] == ["a", "b", "c"]
    with pytest.raises(KeyError, match="colour"):
        run_jobs([[job(tmp_path, "d", text="fail")]], 2, console=console)


def draw(folder, seed):
    """Random numbers of a seed, drawn slowly: another thread's job would draw of them too."""
    import time

    import torch

    torch.manual_seed(seed)
    drawn = []
    for _ in range(20):
        time.sleep(0.01)
        drawn.append(torch.rand(()).item())
    folder.mkdir()
    (folder / "found.json").write_text(json.dumps({"drawn": drawn}))


def draws(place):
    return [
        Job(f"drew {seed}", place / str(seed), ("found.json",), functools.partial(draw, place / str(seed), seed))
        for seed in range(8)
    ]


def test_a_cluster_of_two_workers_does_what_this_process_does_and_its_errors_arrive(tmp_path, console):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    run_jobs([draws(tmp_path / "here")], 1, console=console)
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None, scheduler_port=0) as cluster:
        workers = cluster.scheduler_address.replace("tcp://", "dask://")
        assert run_jobs([draws(tmp_path / "there")], workers, console=console).made == 8
        with pytest.raises(KeyError, match="colour"):
            run_jobs([[job(tmp_path, "d", text="fail")]], workers, console=console)
    for seed in map(str, range(8)):
        assert (tmp_path / "here" / seed / "found.json").read_text() == (
            tmp_path / "there" / seed / "found.json"
        ).read_text()


def test_a_worker_trains_the_same_adapter(tmp_path, finished, miniature, console):
    from linlora.quickstart import run  # here, for workers import this module

    out = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(out / "adapters" / "zero" / "model" / "mirrored-odd")
    results = run(out, seeds=1, settings=miniature, console=console, workers=2)
    assert results["jobs"]["made"] == 3  # the adapter, its fusion and its map
    assert json.loads(json.dumps(results["starts"])) == json.loads(json.dumps(finished[1]["starts"]))


def test_ctrl_c_ends_the_workers_too_without_a_word_of_theirs(tmp_path, patience):
    here = os.path.dirname(__file__)
    main = subprocess.Popen(
        [sys.executable, "-u", "-c", ENDLESS, tmp_path, here],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    printed = ""
    while printed.count("wrote") < 4:
        line = main.stdout.readline()
        assert line, f"the run ended by itself:\n{printed}"
        printed += line
    os.killpg(main.pid, signal.SIGINT)  # as a terminal does, to every process
    printed = main.communicate(timeout=patience)[0]  # until no process holds the other end
    assert main.returncode != 0
    assert printed.count("Traceback") == 1, printed
    whole = len(list(tmp_path.rglob("found.json")))
    assert 4 <= whole < 1000
