"""A run that was interrupted continues where it was, and never on top of something else."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from linlora.experiments import images, report
from linlora.quickstart import DifferentSettingsError, run
from linlora.storage import environment
from linlora.storage.run_directory import only_run_in


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Pictures take longer than all else here."""
    monkeypatch.setattr(report, "draw_all", lambda results, out: None)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that the test may damage."""
    return shutil.copytree(finished[0], tmp_path / "run")


def again(folder, settings, console, **options):
    """The jobs that a further call does, as it prints them, and its results."""
    results = run(folder, **{"seeds": 1, **options}, settings=settings, console=console, workers=1)
    lines = [line for line in console.file.getvalue().splitlines() if "━" not in line]  # the bar of an interrupted call
    return [line for line in lines if line.startswith(("trained", "fused", "mapped"))], results


def numbers(results):
    return json.loads(json.dumps([results["starts"], results["step_time"]]))


def test_a_finished_run_does_nothing_again_and_reports_the_same(copied, finished, miniature, console):
    done, results = again(copied, miniature, console)
    assert done == []
    assert numbers(results) == numbers(finished[1])
    assert results["jobs"]["made"] == 0
    assert results["jobs"]["found"] == finished[1]["jobs"]["made"]


@pytest.mark.parametrize("damage", ["truncated", "not json"])
def test_a_damaged_adapter_is_trained_and_what_depends_on_it_fused_again(copied, finished, miniature, console, damage):
    folder = copied / "adapters" / "warm" / "lora" / "mirrored-odd" / "seed0"
    vector = folder / "task_vector.safetensors"
    if damage == "truncated":
        vector.write_bytes(vector.read_bytes()[:-100])
    else:
        (folder / "training.json").write_text("{")
    done, results = again(copied, miniature, console)
    assert done == [
        "trained LoRA, mirrored-odd, seed 0",
        "fused LoRA, ΔW added, seed 0",
        "fused LoRA, factors added, seed 0",
        "mapped LoRA, factors added",
        "mapped LoRA, ΔW added",
    ]
    assert numbers(results) == numbers(finished[1])


def test_an_interrupted_run_goes_on_after_the_last_finished_adapter(copied, finished, miniature, console, monkeypatch):
    shutil.rmtree(copied / "adapters" / "zero" / "model")
    shutil.rmtree(copied / "fused" / "zero" / "model")
    (copied / "results.json").unlink()
    training_steps, calls = images.training_steps, []

    def interrupted_second_training(*args):
        calls.append(args)
        for step, loss in enumerate(training_steps(*args)):
            if len(calls) == 2 and step == 5:
                raise KeyboardInterrupt
            yield loss

    with monkeypatch.context() as patch:
        patch.setattr(images, "training_steps", interrupted_second_training)
        with pytest.raises(KeyboardInterrupt):
            again(copied, miniature, console)
    assert not (copied / "results.json").exists()
    done, results = again(copied, miniature, console)
    assert done == [
        "trained model scope, rotated-digit, seed 0",  # of the first call
        "trained model scope, mirrored-odd, seed 0",
        "fused linearized, model scope, seed 0",
        "mapped linearized, model scope",
    ]
    assert numbers(results) == numbers(finished[1])
    assert not list(copied.rglob("*.unfinished"))


def test_more_seeds_keep_the_adapters_of_the_first(tmp_path, miniature, console):
    few = dataclasses.replace(
        miniature, starts=("zero",), controls=("layer",), timed_steps=0,
        options=dataclasses.replace(miniature.options, methods=("average",), map_scalings=(), negation_scalings=()),
    )  # fmt: skip
    first, _ = again(tmp_path / "run", few, console)
    both, results = again(tmp_path / "run", few, console, seeds=2)
    assert all(line.endswith("seed 1") for line in both[len(first) :])
    assert results["starts"]["zero"]["controls"]["layer"]["single"]["std"] is not None
    assert results["starts"]["zero"]["controls"]["layer"]["negation"] is None


def test_other_settings_are_refused_by_name(copied, miniature, console):
    before = (copied / "results.json").read_bytes()
    with pytest.raises(DifferentSettingsError, match=r"steps: 15 and 16.*--out.*--fresh"):
        again(copied, dataclasses.replace(miniature, steps=16), console)
    assert (copied / "results.json").read_bytes() == before


def test_a_second_process_in_the_same_directory_is_refused(copied, miniature, console):
    with only_run_in(copied), pytest.raises(FileExistsError, match="another process is working"):
        again(copied, miniature, console, seeds=2)


def test_a_run_that_another_process_works_in_is_not_deleted(copied, miniature, console):
    def files():
        return {path for path in copied.rglob("*") if path.is_file()}

    before = files()
    with only_run_in(copied), pytest.raises(FileExistsError, match="another process is working"):
        again(copied, miniature, console, fresh=True)
    assert files() == before | {copied / ".lock"}


@pytest.mark.parametrize("package", ["linlora", "torch", "transformers", "peft"])
def test_a_run_is_not_continued_with_another_version(copied, miniature, console, monkeypatch, package):
    version = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: "9.9" if name == package else version(name))
    with pytest.raises(DifferentSettingsError, match=rf"{package}: .* and 9\.9"):
        again(copied, miniature, console)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("file", ["thesis.txt", "settings.json"])
def test_a_directory_of_something_else_is_left_alone(tmp_path, miniature, console, file, fresh):
    (tmp_path / file).write_text('{"editor": "precious"}')
    with pytest.raises(FileExistsError, match="not a quickstart run"):
        again(tmp_path, miniature, console, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == [file]
