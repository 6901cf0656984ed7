"""`train` on tiny checkpoints and data sets: every kind of task and method, and what it leaves behind."""

import re
import shutil
from dataclasses import replace

import pytest
import torch

import linlora
from linlora.testing import relative_error
from linlora.training import Data, Run, adapt, evaluate, load_task, plain_yaml, train


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("text", "lora"), ("text", "model"), ("image", "layer"), ("image", "lora-fa"), ("seq2seq", "lora-fa"),
        ("seq2seq", "model"), ("causal", "layer"), ("causal", "lora"), ("zero-shot", "layer"), ("zero-shot", "model"),
    ],
)  # fmt: skip
def test_a_run_is_made_again_from_its_folder_and_by_the_code_of_its_card(settings, kind, method):
    """That code is stock PEFT's, but for model scope, which is no LoRA adapter."""
    run = train(settings(kind, method=method))
    assert run.vector.norm() > 0
    task = load_task(run.settings)
    model = run.model(task).eval()
    assert evaluate(model, task, "test") == run.metrics["test"]
    again = Run.open(run.folder)
    assert (again.settings, again.metrics["validation"]) == (run.settings, run.metrics["validation"])
    assert (run.folder / "adapter_config.json").exists() == (method != "model")
    front, card = (run.folder / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    described = plain_yaml.parse(front)
    assert described["base_model"] == run.settings.model
    value = described["model-index"][0]["results"][1]["metrics"][0]["value"]
    assert value == pytest.approx(run.metrics["test"]["score"], abs=1e-4)
    assert f"| test | {run.metrics['test']['rows']} |" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    names: dict = {}
    exec(code.replace('"FOLDER"', repr(str(run.folder))), names)
    batch = task.inputs([task.rows("test")[i] for i in range(4)])
    with torch.no_grad():
        assert relative_error(task.logits(names["model"].eval(), batch), task.logits(model, batch)) < 1e-6


def test_training_lowers_the_loss_and_learns_what_can_be_seen(settings):
    run = train(settings("image", training={"max_steps": 40}))
    assert run.metrics["test"]["accuracy"] == 1.0  # red or blue
    assert run.metrics["train_loss"] < 0.5


@pytest.mark.parametrize(
    ("optim", "method"),
    [
        ("adamw_torch_fused", "model"), ("adafactor", "model"), ("sgd", "layer"), ("rmsprop", "lora-fa"),
    ],
)  # fmt: skip
def test_optimizers_of_transformers_train(settings, optim, method):
    run = train(settings("text", method=method, training={"optim": optim, "learning_rate": 1e-2, "max_steps": 2}))
    assert 0 < run.vector.norm() < 10


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
    assert (parts.vector - whole.vector).norm() < 1e-4 * whole.vector.norm()


def test_gradient_checkpointing_changes_nothing(settings, tmp_path):
    plain = train(settings("causal", method="model"))
    options = {"method": "model", "training": {"gradient_checkpointing": True}}
    saving = train(settings("causal", out=str(tmp_path / "checkpointing"), **options))
    assert (saving.vector - plain.vector).norm() < 1e-5 * plain.vector.norm()


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


def test_a_text_without_a_number_is_below_every_label(settings, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "good,-3.5\nbad,2.5\n" * 4)
    data = Data(str(tmp_path / "rows.csv"), validation=2)
    task = load_task(settings("causal", data=data, answers=()))
    assert (task.read("-1.5"), task.read("no idea")) == (-1.5, -4.5)


def test_the_number_100_below_zero_is_a_label_as_others_are(settings, tmp_path):
    """Transformers' Trainer takes it for "no label" in its count, by which a sum of losses becomes a mean."""
    scores = {}
    for low in (-100.0, -101.0):
        path = tmp_path / f"{-low:.0f}.csv"
        path.write_text("text,label\n" + f"good,{low}\nbad,{low + 0.5}\n" * 8)
        data = Data(str(path), text=("text",), validation=2)
        wanted = settings("text", data=data, out=str(tmp_path / path.stem), training={"max_steps": 1})
        scores[low] = train(wanted.changed(training={"logging_steps": 1, "learning_rate": 0.0})).metrics["train_loss"]
    assert scores[-100.0] == pytest.approx(scores[-101.0], rel=0.1)


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
