"""`linlora train` and `linlora eval` as they are typed."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linlora import cli
from linlora.training import Run, Settings, plain_yaml

README = Path(__file__).parents[2] / "README.md"
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(checkpoints, review_files, tmp_path):
    content = {
        "model": checkpoints["llama"], "kind": "text-to-text", "out": "runs/both", "lora": LORA,
        "data": {"path": review_files, "test": "test"}, "max_new_tokens": 2,
        "training": {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1},
        "tasks": {
            "mood": {"prompt": "{text} ?", "answers": ["no", "yes"]},
            "word": {"prompt": "{text}", "data": {"label": "word"}},
        },
    }  # fmt: skip
    path = tmp_path / "both.yaml"
    path.write_text(plain_yaml.dump(content))
    return path


def test_the_command_of_the_readme_trains_on_one_file_of_rows(run, checkpoints):
    (command,) = re.findall(r"^linlora (train --model (?:.*\\\n)*.*)$", README.read_text("utf-8"), flags=re.M)
    row = json.dumps({"question": "the film is good ?", "answer": "yes"})
    Path("qa.jsonl").write_text(f"{row}\n" * 20)
    small = {"google/flan-t5-base": checkpoints["t5"], "1000": "1"}
    result = run(*(small.get(word, word) for word in shlex.split(command.replace("\\\n", ""))))
    assert result.exit_code == 0, result.output
    assert "rows: 18 train, 2 validation" in result.output


def test_scores_of_rows_that_were_trained_on_say_so(run, checkpoints, review_files):
    of_files = ("--data", f"{review_files}/train.csv", "--text", "text", "--validation", "0.2", "--out", "runs/mood")
    model = ("--model", checkpoints["bert"], "--kind", "classification", "--steps", "1")
    assert "it is the" not in run("train", *model, *of_files).output
    for fresh in ([], ["--fresh"]):  # a split added to a finished run, and one scored with it
        result = run("train", *model, *of_files, "--test", f"{review_files}/train.csv", *fresh)
        assert "test: it is the train split" in result.output, result.output


def test_the_folder_of_a_run_is_printed_whole_however_narrow_the_terminal(run, checkpoints, review_files, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = "runs/" + "a-long-name-of-a-task-" * 4
    of_text = ("--kind", "classification", "--data", review_files, "--text", "text", "--steps", "1", "--out", out)
    result = run("train", "--model", checkpoints["bert"], *of_text)
    assert f"\nwritten to {out}\n" in result.output


def test_a_recipe_trains_scores_and_fuses(run, recipe):
    result = run("train", recipe)
    assert result.exit_code == 0, result.output
    assert "mood: step 2 of 2, loss" in result.output
    assert "  linlora eval runs/both/mood runs/both/word --fuse task_arithmetic --search\n" in result.output
    again = run("train", recipe, "--task", "mood")
    assert "mood: found finished in runs/both/mood" in again.output

    result = run("eval", "runs/both/mood", "runs/both/word", "--fuse", "task_arithmetic", "--scaling", "0.5")
    assert result.exit_code == 0, result.output
    assert "fused by task_arithmetic (scaling 0.5)" in result.output
    written = json.loads(Path("runs/both-task_arithmetic-test.json").read_text())
    assert written["options"] == {"scaling": 0.5}
    assert set(written["tasks"]) == {"mood", "word"}

    result = run("eval", "runs/both/mood", "runs/both/word", "--fuse", "dare", "--search", "--set", "scaling=[0.5,1.0]",
                 "--set", "drop=0.5", "--split", "validation", "--out", "dare.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert len(json.loads(Path("dare.json").read_text())["search"]) == 2
    assert "search 2 of 2: drop 0.5, scaling 1.0" in result.output
    assert Path("dare.png").exists()

    result = run("eval", "runs/both/mood")
    assert json.loads(Path("runs/both/mood/eval-test.json").read_text())["mean"]["score"] == pytest.approx(
        Run.open("runs/both/mood").metrics["test"]["score"]
    )
    result = run("eval", "runs/both/mood/task_vector.safetensors", "--on", recipe, "--split", "validation")
    assert result.exit_code == 0, result.output
    assert re.search("task +┃ metric +┃ rows +┃ +backbone % ┃ score %", result.output)


def test_flags_make_a_run_and_go_before_the_file(run, recipe, checkpoints, review_files):
    result = run(
        "train", "--model", checkpoints["bert"], "--kind", "classification", "--data", review_files, "--text", "text",
        "--validation", "8", "--rank", "2", "--target", "query", "--target", "value", "--steps", "1", "--seed", "3",
        "--set", "training.weight_decay=0.1", "--method", "lora", "--out", "runs/flags",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    settings = Run.open("runs/flags").settings
    assert (settings.data.validation, settings.seed, settings.method) == (8, 3, "lora")
    assert settings.lora == {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["query", "value"]}
    assert settings.training["weight_decay"] == 0.1
    assert "how to load it: runs/flags/README.md" in result.output
    assert run("train", recipe, "--task", "word", "--steps", "1", "--out", "runs/other").exit_code == 0
    assert Settings.from_yaml("runs/other/word/settings.yaml").training["max_steps"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "error: --model is missing"),
        (["train", "--model", "x", "--kind", "classification", "--data", "x.csv"], "needs one of the two, --text or"),
        (["train", "both.yaml", "--method", "full"], "--method is one of lora, lora-fa, layer, model, got 'full'"),
        (["train", "both.yaml", "--steps", "0"], "--steps is a whole number, 1 or more"),
        (["train", "both.yaml", "--data", "gone.csv"], "data: there is no file gone.csv"),
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        (["train", "both.yaml", "--task", "rte"], "has no task 'rte'; its tasks are mood, word"),
        (["train", "both.yaml", "--set", "training.steps=1"], "unknown key 'steps'"),
        (["train", "both.yaml", "--set", "seed"], "expected KEY=VALUE"),
        (["train", "both.yaml", "--label", "sentiment"], "no column 'sentiment'; its columns are text, thing, label"),
        (["train", "both.yaml", "--target", "nolayer"], "has no layer 'nolayer'; its linear layers end in down_proj, "),
        (["train", "both.yaml", "--target", "a", "--target", "b"], "has no layer 'a', 'b'; its linear layers end in"),
        (["train", "both.yaml", "--model", "nobase"], "model 'nobase': there is no folder nobase, and "),
        (["train", "both.yaml", "--model", "org/nobase"], "'org/nobase': there is no folder org/nobase, and "),
        (["train", "both.yaml", "--test", "0.2"], "--train 'train[:80%]' --test 'train[80%:]'"),
        (["train", "both.yaml", "--set", "lora.target_modules=5"], "lora: 'int' object is not iterable"),
        (["train", "both.yaml", "--set", "lora.target_modules=((("], "lora: missing ), unterminated subpattern"),
        (["train", "both.yaml", "--set", "model_options.dtype=blue"], "model_options: module 'torch' has no"),
        (["train", "deep.yaml"], "deep.yaml: not YAML that can be meant: it nests too deep"),
        (["eval", "missing"], "missing: no such file"),
        (["eval", "missing", "--out", "."], "--out .: a JSON file is written there; name another"),
        (["fuse", "both.yaml", "both.yaml", "--out", "./both.yaml"], "--out both.yaml: a task vector is written to"),
        (["eval", "both.yaml", "--scaling", "0.3"], "name it with --fuse"),
        (["eval", "."], "no adapter in this folder"),
    ],
)
def test_errors_are_one_line(run, recipe, arguments, message):
    Path("deep.yaml").write_text("a: " + "[" * 3000)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_interrupted_run_says_how_to_continue(run, recipe, monkeypatch):
    from linlora import training

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    result = run("train", recipe)
    assert result.exit_code == 130
    assert "run the same command again to continue" in result.output
