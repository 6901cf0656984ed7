"""`train` on tiny checkpoints and data sets: every kind of task and method, and what it leaves behind."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers

import linlora
from linlora.testing import relative_error
from linlora.training import Data, Run, Settings, adapt, evaluate, load_task, plain_yaml, set_head, train
from linlora.training.settings import LEARNING_RATES
from linlora.training.trainer import TaskTrainer, training_arguments

BASES = {
    "text": transformers.AutoModelForSequenceClassification,
    "image": transformers.AutoModelForImageClassification,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "causal": transformers.AutoModelForCausalLM,
    "zero-shot": transformers.CLIPVisionModelWithProjection,
}


def trained_model(run, task):
    """The model of a run, made anew from its folder."""
    model = adapt(task, run.vector).model
    linlora.apply(model, run.vector)
    if run.head is not None:
        set_head(model, run.head)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("text", "lora"), ("text", "model"), ("image", "layer"), ("image", "lora-fa"), ("seq2seq", "lora-fa"),
        ("seq2seq", "model"), ("causal", "layer"), ("causal", "lora"), ("zero-shot", "layer"), ("zero-shot", "model"),
    ],
)  # fmt: skip
def test_a_run_is_made_again_from_its_folder_and_by_stock_peft(settings, kind, method):
    run = train(settings(kind, method=method))
    assert run.vector.norm() > 0
    task = load_task(run.settings)
    model = trained_model(run, task)
    assert evaluate(model, task, "test") == run.metrics["test"]
    again = Run.open(run.folder)
    assert (again.settings, again.metrics["validation"]) == (run.settings, run.metrics["validation"])
    if method == "model":
        assert not (run.folder / "adapter_config.json").exists()  # no LoRA adapter is this function
        return
    batch = task.inputs([task.rows("test")[i] for i in range(4)])
    options = {"num_labels": 2, "ignore_mismatched_sizes": True} if kind in ("text", "image") else {}
    stock = peft.PeftModel.from_pretrained(
        BASES[kind].from_pretrained(run.settings.model, **options), run.folder
    ).eval()
    with torch.no_grad():
        assert relative_error(task.logits(stock, batch), task.logits(model, batch)) < 1e-6


def test_training_lowers_the_loss_and_learns_what_can_be_seen(settings):
    run = train(settings("image", training={"max_steps": 40}))
    assert run.metrics["test"]["accuracy"] == 1.0  # red or blue
    assert run.metrics["train_loss"] < 0.5


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
    assert relative_error(stacked(resumed.vector), stacked(whole.vector)) < 1e-6
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
    ],
    ids=["steps", "epochs", "accumulated", "best", "best in a renamed folder"],
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
    assert torch.equal(stacked(run.vector), stacked(trained[0]))
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


def test_a_finished_run_is_returned_as_it_is(settings):
    run = train(settings("causal"))
    before = (run.folder / "task_vector.safetensors").stat().st_mtime_ns
    assert train(run.settings).metrics == run.metrics
    assert (run.folder / "task_vector.safetensors").stat().st_mtime_ns == before
    assert train(run.settings, fresh=True).metrics["seconds"] != run.metrics["seconds"]


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


def test_settings_that_fail_leave_nothing_behind(settings, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"linear layers of .* are .*query"):
        train(settings("text", out=str(out), lora={"target_modules": ["q_proj"]}))
    assert not out.exists()


@pytest.mark.parametrize(
    ("optim", "method"),
    [
        ("adamw_torch", "layer"), ("adamw_torch_fused", "model"), ("adafactor", "model"), ("sgd", "layer"),
        ("adagrad", "lora"), ("rmsprop", "lora-fa"),
    ],
)  # fmt: skip
def test_optimizers_of_transformers_train(settings, optim, method):
    run = train(settings("text", method=method, training={"optim": optim, "learning_rate": 1e-2, "max_steps": 2}))
    assert 0 < run.vector.norm() < 10


@pytest.mark.parametrize("optim", ["lomo", "schedule_free_adamw", "adamw_anyprecision", "galore_adamw"])
def test_an_optimizer_of_a_missing_package_is_refused_before_anything_is_written(settings, tmp_path, optim):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"^training\.optim: .*install"):
        train(settings("text", out=str(out), training={"optim": optim}))
    assert not out.exists()


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


def test_a_loss_that_is_not_finite_is_an_error_and_no_result(settings):
    wanted = settings("causal", training={"learning_rate": 1e38, "max_grad_norm": 0.0})
    with pytest.raises(ValueError, match=r"causal diverged .* choose a smaller training\.learning_rate"):
        train(wanted)
    with pytest.raises(FileNotFoundError, match="not finished"):
        Run.open(wanted.out)


@pytest.mark.parametrize(
    "changes", [{"training": {"bf16": True}}, {"model_options": {"dtype": "bfloat16"}}], ids=["autocast", "base model"]
)
def test_bf16_trains_fp32_adapters_close_to_fp32(settings, tmp_path, changes):
    exact = train(settings("causal"))
    rounded = train(settings("causal", out=str(tmp_path / "bf16"), **changes))
    assert all(delta.dtype == torch.float32 for delta in rounded.vector.deltas.values())
    assert rounded.vector.norm() == pytest.approx(exact.vector.norm(), rel=0.2)
    assert rounded.metrics["train_loss"] == pytest.approx(exact.metrics["train_loss"], rel=1e-2)
    assert rounded.metrics["train_loss"] != exact.metrics["train_loss"]


@pytest.mark.parametrize("kind", ["causal", "zero-shot"])
def test_batches_that_are_accumulated_train_as_one(settings, tmp_path, kind):
    options = {"lr_scheduler_type": "constant"}
    whole = train(settings(kind, training=options))
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = train(settings(kind, out=str(tmp_path / "parts"), training=options))
    assert relative_error(stacked(parts.vector), stacked(whole.vector)) < 1e-4


def stacked(vector):
    return torch.cat([delta.flatten() for delta in vector.deltas.values()])


def test_gradient_checkpointing_changes_nothing(settings, tmp_path):
    plain = train(settings("causal", method="model"))
    options = {"method": "model", "training": {"gradient_checkpointing": True}}
    saving = train(settings("causal", out=str(tmp_path / "checkpointing"), **options))
    assert relative_error(stacked(saving.vector), stacked(plain.vector)) < 1e-5


def test_runs_of_one_seed_start_from_one_point_whatever_their_data(settings, tmp_path, image_folder):
    three = tmp_path / "three"
    for colour, like in (("red", "red"), ("blue", "blue"), ("green", "blue")):
        shutil.copytree(f"{image_folder}/train/{like}", three / "train" / colour)
    one = adapt(load_task(settings("image"))).start
    other = adapt(load_task(settings("image", data=Data(str(three), validation=2, image="image")))).start
    one.check_same_point(other)  # heads of two and of three classes
    with pytest.raises(linlora.DifferentPointError):
        one.check_same_point(adapt(load_task(settings("image", seed=1))).start)


def test_numbers_are_predicted_by_a_head_and_as_text(settings, review_files):
    data = Data(review_files, test="test", text=("text",), label="score")
    by_head = train(settings("text", data=data, metric="pearson"))
    assert {"spearman", "pearson"} < set(by_head.metrics["test"])
    assert by_head.head["classifier.weight"].shape[0] == 1
    as_text = train(settings("seq2seq", data=Data(review_files, label="score"), answers=()))
    assert set(as_text.metrics["validation"]) == {"score", "spearman", "pearson", "rows"}


def test_evaluation_while_training_is_that_of_the_task(settings):
    run = train(settings("text", training={"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2,
                                           "metric_for_best_model": "score", "load_best_model_at_end": True,
                                           "save_steps": 2, "save_total_limit": 2}))  # fmt: skip
    [state] = sorted(run.folder.glob("checkpoint-*/trainer_state.json"))[-1:]
    logged = [entry["eval_score"] for entry in json.loads(state.read_text())["log_history"] if "eval_score" in entry]
    assert len(logged) == 2
    assert run.metrics["validation"]["score"] == max(logged)


def test_the_best_checkpoint_is_the_one_that_scores_highest(settings, monkeypatch):
    scores = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr("linlora.training.trainer.evaluate", lambda *_, **__: {"score": next(scores)})
    run = train(settings("text", training={**BEST, "save_total_limit": 3, "learning_rate": 3e-2}))
    saved = peft.utils.load_peft_weights(str(run.folder / "checkpoint-2"))
    for name, dB in run.vector.deltas.items():
        layer = name.removesuffix(".dB")
        assert torch.equal(dB, saved[f"base_model.model.{layer}.lora_B.weight"])


def test_a_plateau_is_one_of_scores_that_stop_to_rise(settings):
    def mode(**training):
        plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", **training}
        return training_arguments(settings("text", training=plateau)).lr_scheduler_kwargs

    assert mode() == {"mode": "max"}
    assert mode(lr_scheduler_kwargs={"patience": 2}) == {"mode": "max", "patience": 2}


def test_a_full_disk_is_said_and_leaves_no_result(settings, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    wanted = settings("text", training={"save_steps": 1})
    with pytest.raises(OSError, match=r"a checkpoint in .* could not be written \(.enforce fail"):
        train(wanted)
    assert [path.name for path in Path(wanted.out).glob("*.json")] == ["rows.json"]


def test_the_score_of_the_best_checkpoint_is_checked_first(settings):
    with pytest.raises(ValueError, match=r"metric_for_best_model is one of score, accuracy, f1, matthews, got 'loss'"):
        train(settings("text", training={**BEST, "metric_for_best_model": "eval_loss"}))


def test_labels_of_every_split_are_checked_before_the_first_step(settings, tmp_path):
    (tmp_path / "test.csv").write_text("text,label\nthe film is good,1\nit is bad,7\n")
    data = settings("text").data
    wanted = settings("text", data=replace(data, test=str(tmp_path / "test.csv")))
    with pytest.raises(
        ValueError, match=r"the test split, .*test\.csv: column 'label' holds 7, which is none of .* 0, 1"
    ):
        train(wanted)
    assert not Path(wanted.out).exists()


def test_labels_with_a_fraction_say_what_they_become(settings, tmp_path, review_files):
    def said(**changes):
        task = load_task(settings("text", data=replace(settings("text").data, label="score"), **changes))
        return task.answer, task.labels_in_words()

    answer, words = said()
    assert (answer, words.split(";")[0]) == ("numbers", "numbers from 0.0 to 2.0, predicted by one output")
    assert said(class_names=("low", "middle", "high")) == ("classes", "3 classes, 'low', 'middle', 'high'")


def test_a_frozen_head_is_the_checkpoints_and_is_not_trained(settings, checkpoints, review_files):
    rows = Data(
        review_files, text=("text",), label="thing"
    )  # three things, and the checkpoint's head has three classes
    run = train(settings("text", data=rows, head="frozen"))
    assert run.head is None
    with pytest.raises(ValueError, match=r"lacks classifier.*which would be random: it has no trained head"):
        train(settings("text", data=rows, head="frozen", model=checkpoints["encoder"], out="unused"))
    with pytest.raises(ValueError, match="has a head of 3 classes, column 'label' has 2; set head: trained"):
        train(settings("text", head="frozen", out="unused"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("seq2seq", {"model": "vit"}, "is a vit, which transformers has no text-generating model of"),
        ("image", {"model": "bert"}, "is a bert, which transformers has no image classification model of"),
        ("zero-shot", {"model": "bert"}, "takes a CLIP checkpoint"),
        ("seq2seq", {"prompt": "{sentence} ?"}, "no column 'sentence'; its columns are text, thing"),
        ("seq2seq", {"prompt": "no column"}, "name the columns of the data set in braces"),
        ("seq2seq", {"prompt": "{text"}, "prompt: "),
        ("seq2seq", {"metric": "pearson"}, "'pearson' is not one of classes"),
        ("text", {"model": "./missing"}, r"model './missing': no such folder, and no name of the Hugging"),
        ("text", {"training": {"learning_rate": "fast"}}, r"training\.learning_rate is a number, got 'fast'"),
        ("text", {"training": {"optim": "sgdd"}}, "training: .*sgdd"),
        ("text", {"model_options": {"colour": "red"}}, "model_options: "),
        ("text", {"point": "point.safetensors"}, "no such file"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(settings, checkpoints, kind, changes, message):
    changes = {key: checkpoints.get(value, value) if key == "model" else value for key, value in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(settings(kind, **changes))


def test_the_learning_rate_that_validates_best_makes_the_run(settings):
    wanted = settings("text", lr_grid=(1e-3, 3e-2, 1e-9), training={"max_steps": 8})
    run = train(wanted)
    tried = run.metrics["lr_grid"]
    assert list(tried) == ["1e-09", "0.001", "0.03"]
    assert run.metrics["validation"]["score"] == max(tried.values())
    best = float(max(tried, key=tried.get))
    assert run.metrics["learning_rate"] == best
    alone = train(settings("text", out=f"{wanted.out}-alone", training={"max_steps": 8, "learning_rate": best}))
    assert torch.equal(stacked(alone.vector), stacked(run.vector))
    assert alone.metrics["test"] == run.metrics["test"]
    assert (run.folder / "model_config" / "config.json").exists()
    assert not (run.folder / "learning_rates").exists()
    assert train(wanted).metrics == run.metrics


def test_a_rate_of_the_grid_that_diverges_is_left_out(settings):
    run = train(settings("causal", lr_grid=(1e-3, 1e38), training={"max_grad_norm": 0.0}))
    assert list(run.metrics["lr_grid"]) == ["0.001"]
    with pytest.raises(ValueError, match="diverged at every learning rate of lr_grid"):
        train(settings("causal", out=f"{run.folder}-2", lr_grid=(1e38,), training={"max_grad_norm": 0.0}))


def test_every_method_has_a_learning_rate_of_its_own():
    wanted = Settings("gpt2", "text-to-text", Data("qa.csv"), prompt="{q}", method="layer")
    assert wanted.changed(method="model").learning_rate == LEARNING_RATES["model"]
    assert wanted.changed(training={"learning_rate": 1.0}).changed(method="model").learning_rate == 1.0
    assert training_arguments(wanted).learning_rate == LEARNING_RATES["layer"]


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


def test_a_test_split_that_is_found_is_scored_unless_its_labels_are_withheld(settings, tmp_path, review_files):
    for split in ("train", "validation", "test"):
        shutil.copy(f"{review_files}/{split}.csv", tmp_path)
    data = Data(str(tmp_path), text=("text",))
    assert train(settings("text", data=data)).metrics["test"]["rows"] == 16
    rows = (tmp_path / "test.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([rows[0], *(re.sub(r",[01],", ",-1,", row) for row in rows[1:])]))
    withheld = load_task(settings("text", data=data))
    assert withheld.splits == ("train", "validation")
    assert "a test split was found and is left out: " in withheld.notes["note"][0]


def test_the_classes_are_named_where_the_adapter_is_loaded(settings, review_files):
    run = train(settings("text", data=Data(review_files, text=("text",), label="thing")))
    config = transformers.AutoConfig.from_pretrained(run.folder, subfolder="model_config")
    assert config.id2label == {0: "day", 1: "film", 2: "food"}
    assert config.label2id == {"day": 0, "film": 1, "food": 2}


@pytest.mark.parametrize(
    ("kind", "method"), [("text", "layer"), ("image", "lora"), ("seq2seq", "layer"), ("text", "model")]
)
def test_the_code_of_a_model_card_loads_the_run(settings, kind, method):
    run = train(settings(kind, method=method))
    text = (run.folder / "README.md").read_text()
    front, card = text.removeprefix("---\n").split("---\n", 1)
    described = plain_yaml.parse(front)
    assert described["base_model"] == run.settings.model
    value = described["model-index"][0]["results"][1]["metrics"][0]["value"]
    assert value == pytest.approx(run.metrics["test"]["score"], abs=1e-4)
    assert f"| test | {run.metrics['test']['rows']} |" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    names: dict = {}
    exec(code.replace('"FOLDER"', repr(str(run.folder))), names)
    task = load_task(run.settings)
    batch = task.inputs([task.rows("test")[i] for i in range(4)])
    with torch.no_grad():
        found = task.logits(names["model"].eval(), batch)
        torch.testing.assert_close(found, task.logits(run.model(task).eval(), batch))


def test_reports_of_a_missing_package_are_refused_before_anything_is_written(settings):
    wanted = settings("text", training={"report_to": "wandb"})
    with pytest.raises(ValueError, match=r"^training\.report_to: .*wandb"):
        train(wanted)
    assert not Path(wanted.out).exists()
