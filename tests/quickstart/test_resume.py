"""A run that was interrupted continues where it was, and never on top of something else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest
import torch

from linlora.quickstart import DifferentSettingsError, backbone, finetune, run
from linlora.quickstart.backbone import new_backbone, pretrain
from linlora.quickstart.data import load_digits
from linlora.quickstart.settings import FAMILIES
from linlora.storage.run_directory import only_run_in


@pytest.fixture
def trained(monkeypatch):
    """The (family, task, seed) of every adapter that is trained during the test."""
    log = []
    fine_tune = finetune.fine_tune

    def logging_fine_tune(experiment, family, task, seed):
        log.append((family, task, seed))
        fine_tune(experiment, family, task, seed)

    monkeypatch.setattr(finetune, "fine_tune", logging_fine_tune)
    return log


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that the test may damage."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_a_finished_run_trains_nothing_again_and_reports_the_same(copied, finished, trained, miniature, console):
    results = run(copied, seeds=1, settings=miniature, console=console, processes=1)
    assert trained == []
    assert results["families"] == finished[1]["families"]
    assert results["step_time"] == finished[1]["step_time"]
    assert results["adapters_found_from_earlier_call"] == 6


def test_an_interrupted_run_goes_on_after_the_last_finished_adapter(
    tmp_path, finished, trained, miniature, console, monkeypatch
):
    training_steps = finetune.training_steps

    def interrupted_third_training(*args):
        for step, loss in enumerate(training_steps(*args)):
            if len(trained) == 3 and step == 5:
                raise KeyboardInterrupt
            yield loss

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "training_steps", interrupted_third_training)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", seeds=1, settings=miniature, console=console, processes=1)
    assert not (tmp_path / "run" / "results.json").exists()
    first_call = list(trained)
    trained.clear()

    results = run(tmp_path / "run", seeds=1, settings=miniature, console=console, processes=1)
    assert trained == [first_call[2], *((family, "mirrored-odd", 0) for family in FAMILIES)]
    assert results["families"] == finished[1]["families"]
    assert not list((tmp_path / "run").rglob("*.unfinished"))


@pytest.mark.parametrize(
    ("family", "damage"), [("lora", "missing"), ("layer", "truncated"), ("model", "truncated"), ("model", "not json")]
)
def test_a_damaged_adapter_is_trained_again_and_fused_again(
    copied, finished, trained, miniature, console, family, damage
):
    directory = copied / "adapters" / family / "mirrored-odd" / "seed0"
    vector = directory / "task_vector.safetensors"
    if damage == "missing":
        vector.unlink()
    elif damage == "truncated":
        vector.write_bytes(vector.read_bytes()[:-100])
    else:
        (directory / "training.json").write_text("{")
    scores = copied / "fused" / family / "seed0" / "scores.json"
    os.utime(scores, ns=(0, 0))  # clocks of file systems may stand still for two seconds
    results = run(copied, seeds=1, settings=miniature, console=console, processes=1)
    assert trained == [(family, "mirrored-odd", 0)]
    assert scores.stat().st_mtime_ns > 0
    assert results["families"] == finished[1]["families"]


def test_more_seeds_keep_the_adapters_of_the_first(copied, trained, miniature, console):
    results = run(copied, seeds=2, settings=miniature, console=console, processes=1)
    assert {seed for _, _, seed in trained} == {1}
    assert results["families"]["lora"]["single"]["std"] is not None


def test_other_settings_are_refused_by_name(copied, trained, miniature, console):
    before = (copied / "results.json").read_bytes()
    with pytest.raises(DifferentSettingsError, match=r"steps: 15 there, 16 now.*--out.*--fresh"):
        run(copied, seeds=1, settings=dataclasses.replace(miniature, steps=16), console=console, processes=1)
    assert trained == []
    assert (copied / "results.json").read_bytes() == before


def test_fresh_starts_over(copied, trained, miniature, console):
    run(copied, seeds=1, fresh=True, settings=dataclasses.replace(miniature, steps=3), console=console, processes=1)
    assert len(trained) == 6
    assert json.loads((copied / "settings.json").read_text())["steps"] == 3


def test_a_second_process_in_the_same_directory_is_refused(copied, trained, miniature, console):
    with only_run_in(copied), pytest.raises(FileExistsError, match="another process is working"):
        run(copied, seeds=2, settings=miniature, console=console, processes=1)
    assert trained == []


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("file", ["thesis.txt", "settings.json"])
def test_a_directory_of_something_else_is_left_alone(tmp_path, miniature, console, file, fresh):
    (tmp_path / file).write_text('{"editor": "precious"}')
    with pytest.raises(FileExistsError, match="not a quickstart run"):
        run(tmp_path, seeds=1, fresh=fresh, settings=miniature, console=console, processes=1)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_interrupted_pretraining_ends_as_the_uninterrupted_one(tmp_path, miniature, monkeypatch):
    digits = load_digits()
    train = digits.split(digits.images, digits.digits)["train"].first(200)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = pretrain(miniature, train, tmp_path / "whole", "cpu")

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(miniature, train, tmp_path / "parts", "cpu", on_epoch=interrupt)
    assert (tmp_path / "parts" / backbone.PARTIAL_FILE).exists()
    found, done = [], []
    parts = pretrain(miniature, train, tmp_path / "parts", "cpu", lambda: done.append(1), lambda: found.append(1))
    assert (len(found), len(done)) == (1, miniature.pretraining_epochs - 1)
    images = digits.images[:20]
    torch.testing.assert_close(backbone.features(parts, images), backbone.features(whole, images))
    untrained = new_backbone(miniature).eval()
    assert not torch.allclose(backbone.features(parts, images), backbone.features(untrained, images), atol=1e-2)
