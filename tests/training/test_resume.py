"""Checkpoints: runs that end early go on where they were, finished ones are left as they are, the best one is kept."""

import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from PIL import Image
from rich.console import Console

import linlora
from linlora.storage.run_directory import only_run_in
from linlora.testing import relative_error
from linlora.training import Data, Run, train
from linlora.training.data import load_split
from linlora.training.kept_rows import digest
from linlora.training.trainer import TaskTrainer


@pytest.fixture(scope="module")
def other_point(checkpoints, review_files, tmp_path_factory):
    """A point with B0 != 0 for the adapter of settings("text")."""
    model = peft.get_peft_model(
        transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["bert"]),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]),
    )
    linlora.testing.randomize(model)
    linlora.linearize(model)
    path = tmp_path_factory.mktemp("point") / "point.safetensors"
    linlora.TaskVector.from_model(model).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("method", "moved"), [("lora", False), ("lora-fa", True), ("layer", True), ("model", False), ("model", True)]
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(settings, method, moved, other_point, tmp_path, monkeypatch):
    common = {"method": method, "training": {"save_steps": 2, "weight_decay": 0.1}}
    common["point"] = other_point if moved else None
    whole = train(settings("text", out=str(tmp_path / "whole"), **common))
    broken = settings("text", out=str(tmp_path / "broken"), **common)
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "_save_checkpoint", stop_after(TaskTrainer._save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert not (tmp_path / "broken" / "metrics.json").exists()
    resumed = train(broken)
    assert resumed.metrics["continued_from"].endswith("checkpoint-2")
    assert (resumed.vector - whole.vector).norm() < 1e-6 * whole.vector.norm()
    for key, weight in whole.head.items():
        assert relative_error(resumed.head[key], weight) < 1e-6
    if method == "lora-fa":
        assert all(not delta.any() for key, delta in resumed.vector.deltas.items() if key.endswith(".dA"))


def stop_after(save):
    """Ctrl-C, just after a checkpoint is written."""

    def saved(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    return saved


BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "max_steps": 3}


@pytest.mark.parametrize(
    ("training", "moved"),
    [
        ({"save_steps": 1}, False),
        ({"num_train_epochs": 0.7, "max_steps": -1, "save_strategy": "epoch"}, False),
        ({"save_steps": 2, "gradient_accumulation_steps": 4, "max_steps": 2}, False),
        ({**BEST, "save_total_limit": 1}, False),
        ({**BEST, "save_total_limit": 1}, True),
        ({**BEST, "load_best_model_at_end": False}, False),
    ],
    ids=["steps", "epochs", "accumulated", "best", "best in a renamed folder", "an earlier one scored best"],
)
def test_a_run_that_ended_training_trains_nothing_more(settings, tmp_path, monkeypatch, training, moved):
    scores = iter([0.5, 0.7, 0.6])  # the second evaluation is the best
    monkeypatch.setattr("linlora.training.trainer.evaluate", lambda *_, **__: {"score": next(scores)})
    wanted = settings("text", training={"learning_rate": 3e-2, "lr_scheduler_type": "constant", **training})
    trained = []
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["linlora.training.run"], "_write", killed_with(trained))
        with pytest.raises(KeyboardInterrupt):
            train(wanted)
    if moved:
        shutil.move(wanted.out, tmp_path / "moved")
        wanted = wanted.changed(out=str(tmp_path / "moved"))
    steps = []
    monkeypatch.setattr(TaskTrainer, "training_step", lambda *_, **__: steps.append(1))
    run = train(wanted)
    assert not steps
    assert (run.vector - trained[0]).norm() == 0.0
    assert run.metrics["continued_from"]


def killed_with(trained):
    """Ctrl-C when all is trained, before any of it is written."""

    def killed(model, *_):
        trained.append(linlora.TaskVector.from_model(model))
        raise KeyboardInterrupt

    return killed


def test_a_checkpoint_that_was_cut_short_is_left_out(settings, monkeypatch):
    wanted = settings("causal", training={"save_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "_save_checkpoint", stop_after(TaskTrainer._save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train(wanted)
    folder = wanted.out
    broken = f"{folder}/checkpoint-3"
    shutil.copytree(f"{folder}/checkpoint-2", broken)
    with open(f"{broken}/trainer_state.json", "w") as file:
        file.write('{"global_step": 3, ')
    assert train(wanted).metrics["continued_from"] == f"{folder}/checkpoint-2"


@pytest.mark.parametrize("change", ["a row more", "another cell"])
def test_an_interrupted_run_does_not_go_on_with_other_rows(settings, tmp_path, review_files, monkeypatch, change):
    for split in ("train", "validation", "test"):
        shutil.copy(f"{review_files}/{split}.csv", tmp_path)
    data = Data(str(tmp_path), test="test", text=("text",))
    wanted = settings("text", data=data, out=str(tmp_path / "run"), training={"save_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "_save_checkpoint", stop_after(TaskTrainer._save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train(wanted)
    file = tmp_path / "train.csv"
    rows = file.read_text()
    header, first, *rest = rows.splitlines(keepends=True)
    changed = rows + first if change == "a row more" else "".join([header, "x" + first, *rest])
    file.write_text(changed, newline="")
    numbers = "48 and 49" if change == "a row more" else "48 and 48"
    with pytest.raises(ValueError, match=rf"the train split, .*, has changed since the run .* \({numbers} rows\)"):
        train(wanted)
    file.write_text(rows)
    assert train(wanted).metrics["continued_from"]


def test_a_run_that_goes_on_in_other_processes_says_so(settings, monkeypatch):
    wanted = settings("causal", training={"save_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "_save_checkpoint", stop_after(TaskTrainer._save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train(wanted)
    state = Path(wanted.out) / "checkpoint-2" / "rng_state.pth"
    shutil.copy(state, state.with_name("rng_state_1.pth"))
    state.rename(state.with_name("rng_state_0.pth"))
    console = Console(file=io.StringIO(), width=200)
    train(wanted, console=console)
    assert "2 processes began this run and 1 go on: a step takes other rows" in console.file.getvalue()


def test_a_grid_does_not_go_on_with_other_rows(settings, tmp_path, review_files, monkeypatch):
    for split in ("train", "validation", "test"):
        shutil.copy(f"{review_files}/{split}.csv", tmp_path)
    data = Data(str(tmp_path), text=("text",), test=False)
    wanted = settings("text", data=data, out=str(tmp_path / "run"), lr_grid=(1e-3, 1e-2), training={"max_steps": 1})
    module, started = sys.modules["linlora.training.run"], []
    real = module._train

    def first_only(*args):
        started.append(args)
        if len(started) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_train", first_only)
    with pytest.raises(KeyboardInterrupt):
        train(wanted)
    with open(tmp_path / "validation.csv", "a") as file:
        file.write("the film is bad,film,0,no,0.0\n")
    with pytest.raises(ValueError, match=r"the validation split, .*, has changed since the run .* \(16 and 17 rows\)"):
        train(wanted)


def test_images_of_another_size_are_other_rows(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    data = Data(str(tmp_path / "images"), image="image")
    before = digest(load_split(data, "test", ["image", "label"]))
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "test" / "red" / "0.png")
    assert digest(load_split(data, "test", ["image", "label"])) != before


def test_a_run_that_is_under_way_is_not_deleted(settings):
    run = train(settings("causal", training={"max_steps": 1}))
    with only_run_in(run.folder), pytest.raises(FileExistsError, match="another process is working"):
        train(run.settings, fresh=True)
    assert Run.open(run.folder).metrics == run.metrics


def test_a_finished_run_is_returned_as_it_is(settings):
    run = train(settings("causal"))
    before = (run.folder / "task_vector.safetensors").stat().st_mtime_ns
    assert train(run.settings).metrics == run.metrics
    assert (run.folder / "task_vector.safetensors").stat().st_mtime_ns == before
    assert train(run.settings, fresh=True).metrics["seconds"] != run.metrics["seconds"]


def test_a_test_split_is_added_to_a_finished_run(settings, review_files):
    data = settings("text").data
    run = train(settings("text", data=replace(data, test=False)))
    assert "test" not in run.metrics
    before = (run.folder / "task_vector.safetensors").stat().st_mtime_ns
    added = train(settings("text", data=replace(data, test=f"{review_files}/test.csv")))
    assert added.metrics["test"]["rows"] == 16
    assert (run.folder / "task_vector.safetensors").stat().st_mtime_ns == before
    again = Run.open(run.folder)
    assert (again.metrics, again.settings.data.test) == (added.metrics, f"{review_files}/test.csv")
    whole = train(settings("text", out=f"{run.folder}-whole", data=replace(data, test=f"{review_files}/test.csv")))
    assert whole.metrics["test"] == added.metrics["test"]
    assert {**again.metrics, "test": None} == {**run.metrics, "test": None}


@pytest.mark.parametrize("tested", [False, True])
def test_a_finished_run_takes_another_name_and_stays_as_it_is(settings, review_files, tested):
    data = replace(settings("text").data, test=False)
    run = train(settings("text", data=data))
    before = (run.folder / "task_vector.safetensors").stat().st_mtime_ns
    again = replace(data, test=f"{review_files}/test.csv") if tested else data
    train(settings("text", data=again, name="mood"))
    renamed = Run.open(run.folder)
    assert (renamed.settings.name, renamed.metrics["task"], "test" in renamed.metrics) == ("mood", "mood", tested)
    assert "# mood" in (run.folder / "README.md").read_text()
    assert (run.folder / "task_vector.safetensors").stat().st_mtime_ns == before


def test_scores_of_one_test_split_are_never_those_of_another(settings, review_files, monkeypatch):
    """Ctrl-C between the two files that are written when another test split is scored."""

    def interrupted(*_):
        raise KeyboardInterrupt

    data = settings("text").data
    wanted = settings("text", data=replace(data, test=f"{review_files}/test.csv"))
    assert train(wanted).metrics["test"]["rows"] == 16
    other = wanted.changed(data=replace(data, test=f"{review_files}/train.csv"))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["linlora.training.run"], "write_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(other)
    assert train(other).metrics["test"]["rows"] == 48


def test_a_folder_of_other_settings_or_of_something_else_is_left_alone(settings, tmp_path):
    train(settings("causal"))
    changed = settings("causal", seed=1, training={"learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"seed: 0 and 1; training.learning_rate: 0.01 and 0.001.*--fresh"):
        train(changed)
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("...")
    for fresh in (False, True):
        with pytest.raises(FileExistsError, match="not a run of linlora train"):
            train(settings("causal", out=str(folder)), fresh=fresh)
    assert [path.name for path in folder.iterdir()] == ["chapter.tex"]
    (folder / "settings.yaml").write_text("editor: precious\n")
    with pytest.raises(ValueError, match=r"settings\.yaml"):
        train(settings("causal", out=str(folder)), fresh=True)
    assert len(list(folder.iterdir())) == 2


def test_a_full_disk_is_said_and_leaves_no_result(settings, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    wanted = settings("text", training={"save_steps": 1})
    with pytest.raises(OSError, match=r"a checkpoint in .* could not be written \(.enforce fail"):
        train(wanted)
    assert [path.name for path in Path(wanted.out).glob("*.json")] == ["rows.json"]


def test_the_best_checkpoint_is_the_one_that_scores_highest(settings, monkeypatch):
    scores = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr("linlora.training.trainer.evaluate", lambda *_, **__: {"score": next(scores)})
    run = train(settings("text", training={**BEST, "save_total_limit": 3, "learning_rate": 3e-2}))
    saved = peft.utils.load_peft_weights(str(run.folder / "checkpoint-2"))
    for name, dB in run.vector.deltas.items():
        layer = name.removesuffix(".dB")
        assert torch.equal(dB, saved[f"base_model.model.{layer}.lora_B.weight"])


def test_the_score_of_the_best_checkpoint_is_checked_first(settings):
    with pytest.raises(ValueError, match=r"metric_for_best_model is one of score, accuracy, f1, matthews, got 'loss'"):
        train(settings("text", training={**BEST, "metric_for_best_model": "eval_loss"}))
