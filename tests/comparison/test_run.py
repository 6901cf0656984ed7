"""A miniature of the comparison: its numbers follow from its files, it resumes, and it writes what it says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from functools import partial

import pytest
import torch
from matplotlib.image import imread

import linlora
from linlora import TaskVector
from linlora.comparison import compare_digits, digits, phases, write
from linlora.comparison.controls import BY_KEY, space
from linlora.comparison.phases import controls_of
from linlora.comparison.report import markdown
from linlora.comparison.settings import METHODS
from linlora.quickstart import DifferentSettingsError
from linlora.quickstart.experiment import open_experiment

TASKS = ("rotated-digit", "mirrored-odd")
CONTROLS = [(start, control.key) for start in ("zero", "warm") for control in controls_of(start)]


def test_every_control_and_method_is_there(finished):
    starts = finished[1]["starts"]
    assert {start: list(starts[start]["controls"]) for start in starts} == {
        "zero": ["factors", "delta_weight", "layer", "model"],
        "warm": ["factors", "delta_weight", "lora_fa", "layer", "model"],
    }
    for start, key in CONTROLS:
        assert tuple(starts[start]["controls"][key]["methods"]) == METHODS


def test_the_table_holds_the_numbers_of_the_json_and_those_follow_from_the_scores_by_task(finished):
    out, results, printed = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (out / "table.txt").read_text(encoding="utf-8")
    for start, key in CONTROLS:
        entry = results["starts"][start]["controls"][key]
        (single,) = entry["single_by_seed_and_task"]
        assert entry["single"]["mean"] == pytest.approx(statistics.fmean(single))
        for method in entry["methods"].values():
            (fused,) = method["by_seed_and_task"]
            assert method["absolute"]["mean"] == pytest.approx(statistics.fmean(fused))
            ratio = statistics.fmean(f / s for f, s in zip(fused, single, strict=True))
            assert method["normalised"]["mean"] == pytest.approx(ratio)
            for value in (method["absolute"], method["normalised"]):
                assert f"{100 * value['mean']:.1f}" in table
                assert f"{100 * value['mean']:.1f}" in printed
                assert f"{100 * value['mean']:.1f}" in markdown(results)


@pytest.mark.parametrize(("start", "key"), CONTROLS)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_score_is_what_the_vectors_on_disk_give_with_the_chosen_options(finished, miniature, start, key, method):
    out, results, _ = finished
    experiment = open_experiment(miniature.quickstart, out, "cpu")
    control = BY_KEY[key]
    vectors = digits.load_vectors(experiment, start, control.trained, seed=0)
    found = results["starts"][start]["controls"][key]["methods"][method]
    at = space(control, experiment.backbone, vectors, method)
    at.put(linlora.fuse(at.vectors, method, **found["options_by_seed"][0]))
    assert experiment.accuracies(at.model, "test") == pytest.approx(found["by_seed_and_task"][0], abs=0.0041)
    best = max(point["mean"] for point in found["validation"])
    assert next(p["mean"] for p in found["validation"] if p["options"] == found["options_by_seed"][0]) == best


def test_all_kinds_of_training_start_from_one_adapter_which_is_zero_or_not(finished):
    out = finished[0]
    for start, is_warm in (("zero", False), ("warm", True)):
        files = out.glob(f"adapters/{start}/*/*/seed0/task_vector.safetensors")
        vectors = [TaskVector.load(file) for file in files]
        assert len(vectors) == len(TASKS) * (4 if is_warm else 3)
        assert any(B0.any() for v in vectors for n, B0 in v.point.items() if n.endswith(".B0")) == is_warm
        for name, A0 in vectors[0].point.items():
            if name.endswith(".A0"):
                assert all(torch.equal(A0, vector.point[name]) for vector in vectors)


def test_before_fine_tuning_all_controls_of_a_start_are_one_model(finished):
    for start in finished[1]["starts"].values():
        assert len({entry["before"]["mean"] for entry in start["controls"].values()}) == 1


def test_single_scores_are_those_of_the_kind_of_training(finished):
    controls = finished[1]["starts"]["warm"]["controls"]
    assert controls["factors"]["single"] == controls["delta_weight"]["single"]


@pytest.mark.parametrize("picture", ["scores", "scalings", "cosines", "disentanglement"])
def test_the_pictures_show_something(finished, picture):
    pixels = imread(finished[0] / f"{picture}.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.02


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture
def log(monkeypatch):
    """The jobs that are done during the test; the pictures, which take longer, are left out."""
    monkeypatch.setattr(write, "draw_all", lambda results, out: None)
    done = []

    def logged(function, settings, experiment, *job):
        done.append((function.__name__, *(getattr(part, "key", part) for part in job)))
        function(settings, experiment, *job)

    for name in ("ADAPTERS", "FUSIONS", "MAPS"):
        phase = getattr(phases, name)
        monkeypatch.setattr(phases, name, dataclasses.replace(phase, function=partial(logged, phase.function)))
    return done


def test_a_finished_run_does_nothing_again_and_reports_the_same(copied, finished, log, miniature, console):
    results = compare_digits(copied, seeds=1, settings=miniature, console=console, processes=1)
    assert log == []
    assert json.loads(json.dumps(results["starts"])) == json.loads(json.dumps(finished[1]["starts"]))


def test_a_damaged_adapter_is_trained_and_what_depends_on_it_fused_again(copied, finished, log, miniature, console):
    file = copied / "adapters" / "warm" / "lora" / "mirrored-odd" / "seed0" / "task_vector.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    results = compare_digits(copied, seeds=1, settings=miniature, console=console, processes=1)
    assert log == [
        ("train", "warm", "lora", "mirrored-odd", 0),
        ("fuse", "warm", "factors", 0),
        ("fuse", "warm", "delta_weight", 0),
        ("measure_map", "warm", "factors"),
        ("measure_map", "warm", "delta_weight"),
    ]
    assert json.loads(json.dumps(results["starts"])) == json.loads(json.dumps(finished[1]["starts"]))


def test_an_interrupted_run_goes_on_with_what_is_missing(copied, log, miniature, console, monkeypatch):
    shutil.rmtree(copied / "fused" / "zero" / "layer")
    shutil.rmtree(copied / "maps" / "warm" / "model")
    compare_digits(copied, seeds=1, settings=miniature, console=console, processes=1)
    assert log == [("fuse", "zero", "layer", 0), ("measure_map", "warm", "model")]
    assert not list(copied.rglob("*.unfinished"))


def test_other_settings_are_refused(copied, miniature, console):
    with pytest.raises(DifferentSettingsError, match="compare"):
        compare_digits(
            copied, seeds=1, settings=dataclasses.replace(miniature, warmup_steps=6), console=console, processes=1
        )


def test_a_directory_of_something_else_is_left_alone(tmp_path, miniature, console):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a linlora compare run"):
        compare_digits(tmp_path, seeds=1, fresh=True, settings=miniature, console=console, processes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
