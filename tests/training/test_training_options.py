"""What the settings of training do, and which are refused before anything is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from linlora.training import Data, Run, Settings, train
from linlora.training.settings import LEARNING_RATES
from linlora.training.trainer import training_arguments


def test_evaluation_while_training_is_that_of_the_task(settings):
    run = train(settings("text", training={"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2,
                                           "metric_for_best_model": "score", "load_best_model_at_end": True,
                                           "save_steps": 2, "save_total_limit": 2}))  # fmt: skip
    [state] = sorted(run.folder.glob("checkpoint-*/trainer_state.json"))[-1:]
    logged = [entry["eval_score"] for entry in json.loads(state.read_text())["log_history"] if "eval_score" in entry]
    assert len(logged) == 2
    assert run.metrics["validation"]["score"] == max(logged)


DECIDING = [
    {"load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2},
    {"save_strategy": "best"},
    {"lr_scheduler_type": "reduce_lr_on_plateau"},
    {"eval_strategy": "steps"},
]


@pytest.mark.parametrize("training", [{}, *DECIDING], ids=lambda training: next(iter(training), "nothing"))
def test_what_decides_is_scored_on_all_rows(settings, monkeypatch, training):
    limits = []
    monkeypatch.setattr(
        "linlora.training.trainer.evaluate", lambda *_, limit, **__: limits.append(limit) or {"score": 0.5, "rows": 1}
    )
    base = settings("text")
    base = replace(base, training={key: value for key, value in base.training.items() if key != "eval_strategy"})
    train(base.changed(training={"max_steps": 2, "eval_steps": 1, **training}))
    assert set(limits) == ({None} if training else {256})


@pytest.mark.parametrize("kind", ["text", "causal"])
def test_evaluation_changes_nothing_of_what_is_trained(settings, tmp_path, kind):
    options = {"lora": {"lora_dropout": 0.5}, "training": {"eval_steps": 1}}
    runs = [
        train(settings(kind, out=str(tmp_path / shown), **options).changed(training={"eval_strategy": shown}))
        for shown in ("no", "steps")
    ]
    assert (runs[0].vector - runs[1].vector).norm() == 0


def test_a_plateau_is_one_of_scores_that_stop_to_rise(settings):
    def mode(**training):
        plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", **training}
        return training_arguments(settings("text", training=plateau)).lr_scheduler_kwargs

    assert mode() == {"mode": "max"}
    assert mode(lr_scheduler_kwargs={"patience": 2}) == {"mode": "max", "patience": 2}


def test_every_method_has_a_learning_rate_of_its_own():
    wanted = Settings("gpt2", "text-to-text", Data("qa.csv"), prompt="{q}", method="layer")
    assert wanted.changed(method="model").learning_rate == LEARNING_RATES["model"]
    assert wanted.changed(training={"learning_rate": 1.0}).changed(method="model").learning_rate == 1.0
    assert training_arguments(wanted).learning_rate == LEARNING_RATES["layer"]


def test_the_learning_rate_that_validates_best_makes_the_run(settings):
    wanted = settings("text", lr_grid=(1e-3, 3e-2, 1e-9), training={"max_steps": 8})
    run = train(wanted)
    tried = run.metrics["lr_grid"]
    assert list(tried) == ["1e-09", "0.001", "0.03"]
    assert run.metrics["validation"]["score"] == max(tried.values())
    best = float(max(tried, key=tried.get))
    assert run.metrics["learning_rate"] == best
    alone = train(settings("text", out=f"{wanted.out}-alone", training={"max_steps": 8, "learning_rate": best}))
    assert (alone.vector - run.vector).norm() == 0
    assert alone.metrics["test"] == run.metrics["test"]
    assert (run.folder / "model_config" / "config.json").exists()
    assert (run.folder / "rows.json").exists()
    assert not (run.folder / "learning_rates").exists()
    assert train(wanted).metrics == run.metrics


def test_a_rate_of_the_grid_that_diverges_is_left_out(settings):
    run = train(settings("causal", lr_grid=(1e-3, 1e38), training={"max_grad_norm": 0.0}))
    assert list(run.metrics["lr_grid"]) == ["0.001"]
    with pytest.raises(ValueError, match="diverged at every learning rate of lr_grid"):
        train(settings("causal", out=f"{run.folder}-2", lr_grid=(1e38,), training={"max_grad_norm": 0.0}))


def test_a_loss_that_is_not_finite_is_an_error_and_no_result(settings):
    wanted = settings("causal", training={"learning_rate": 1e38, "max_grad_norm": 0.0})
    with pytest.raises(ValueError, match=r"causal diverged .* choose a smaller training\.learning_rate"):
        train(wanted)
    with pytest.raises(FileNotFoundError, match="not finished"):
        Run.open(wanted.out)


def test_training_without_a_step_is_no_result(settings):
    wanted = settings("text", training={"dataloader_drop_last": True, "per_device_train_batch_size": 64})
    with pytest.raises(ValueError, match="text made no step of training: its 48 rows fill no batch"):
        train(wanted)
    with pytest.raises(FileNotFoundError, match="not finished"):
        Run.open(wanted.out)


def test_settings_that_fail_leave_nothing_behind(settings, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"has no layer 'q_proj'; its linear layers end in .*query"):
        train(settings("text", out=str(out), lora={"target_modules": ["q_proj"]}))
    assert not out.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim", "lomo"), ("optim", "schedule_free_adamw"), ("optim", "galore_adamw"), ("report_to", "wandb")],
)
def test_what_needs_a_missing_package_is_refused_before_anything_is_written(settings, key, value):
    wanted = settings("text", training={key: value})
    with pytest.raises(ValueError, match=rf"^training\.{key}: .*(install|wandb)"):
        train(wanted)
    assert not Path(wanted.out).exists()


def test_labels_of_every_split_are_checked_before_the_first_step(settings, tmp_path):
    (tmp_path / "test.csv").write_text("text,label\nthe film is good,1\nit is bad,7\n")
    data = settings("text").data
    wanted = settings("text", data=replace(data, test=str(tmp_path / "test.csv")))
    with pytest.raises(
        ValueError, match=r"the test split, .*test\.csv: column 'label' holds 7, which is none of .* 0, 1"
    ):
        train(wanted)
    assert not Path(wanted.out).exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("seq2seq", {"model": "vit"}, "is a vit, which transformers has no text-generating model of"),
        ("image", {"model": "bert"}, "is a bert, which transformers has no image classification model of"),
        ("zero-shot", {"model": "bert"}, "takes a CLIP checkpoint"),
        ("seq2seq", {"prompt": "{sentence} ?"}, "no column 'sentence'; its columns are text, thing"),
        ("seq2seq", {"prompt": "no column"}, "name the columns of the data set in braces"),
        ("seq2seq", {"prompt": "{text"}, "prompt: "),
        ("seq2seq", {"answers": ("Yes.", "yes")}, "answers: 'yes' is read as 'Yes.', since case, white"),
        ("seq2seq", {"answers": ("!", "yes")}, "answers: '!' is read as a text without words"),
        ("seq2seq", {"metric": "pearson"}, "'pearson' is not one of classes"),
        ("text", {"model": "./missing"}, r"model './missing': no such folder, and no name of the Hugging"),
        ("text", {"training": {"learning_rate": "fast"}}, r"training\.learning_rate is a number, .*got 'fast'"),
        ("text", {"training": {"optim": "sgdd"}}, "training: .*sgdd"),
        ("text", {"model_options": {"colour": "red"}}, "model_options: "),
        ("text", {"point": "point.safetensors"}, "no such file"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(settings, checkpoints, kind, changes, message):
    changes = {key: checkpoints.get(value, value) if key == "model" else value for key, value in changes.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(settings(kind, **changes))
