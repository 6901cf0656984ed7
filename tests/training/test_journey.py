"""The way from training to a merged model, as it is typed; every command that is printed is run as it was printed."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from typer.testing import CliRunner

from linlora import cli, formats
from linlora.training import Run, plain_yaml


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def runner(line):
        result = CliRunner().invoke(cli.app, shlex.split(line))
        assert result.exit_code == 0, result.output
        return result.output

    return runner


@pytest.fixture
def recipe(checkpoints, review_files, tmp_path):
    content = {
        "model": checkpoints["encoder"], "kind": "classification", "out": "runs",
        "lora": {"r": 4, "target_modules": ["query", "value"]}, "data": {"path": review_files, "text": ["text"]},
        "training": {"max_steps": 2, "learning_rate": 1e-2, "eval_strategy": "no"},
        "tasks": {"mood": {}, "thing": {"data": {"label": "thing"}}},
    }  # fmt: skip
    (tmp_path / "both.yaml").write_text(plain_yaml.dump(content))


def hints(output):
    """The commands that are printed to be typed next."""
    return re.findall(r"^  linlora (.*)$", output, flags=re.M)


@pytest.mark.parametrize("method", ["layer", "model"])
def test_every_command_that_is_printed_works(run, recipe, method):
    waiting, done = [f"train both.yaml --method {method}", f"train both.yaml --task thing --method {method}"], []
    while waiting:
        line = waiting.pop(0)
        done.append(line)
        waiting += [hint for hint in hints(run(line)) if hint not in (*done, *waiting)]
    commands = [line.split()[0] for line in done]
    assert {"eval", "inspect", "fuse", "export", "merge"} <= set(commands)
    assert any("--search" in line for line in done)
    assert any("--cast layer" in line for line in done) == (method == "model")
    assert Path("runs-fused-merged/config.json").exists()


def test_a_classifier_goes_from_training_to_a_merged_model_with_its_class_names(run, recipe, checkpoints):
    run("train both.yaml --task thing")
    run("export runs/thing --out exported")
    assert (Path("exported") / "README.md").read_text() == (Path("runs/thing") / "README.md").read_text()
    assert "it loads by BertForSequenceClassification" in run(f"merge {checkpoints['encoder']} exported --out merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    assert merged.config.id2label == {0: "day", 1: "film", 2: "food"}
    config = transformers.AutoConfig.from_pretrained("exported", subfolder="model_config")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["encoder"], config=config)
    stock = PeftModel.from_pretrained(base, "exported").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints["encoder"])
    batch = tokenizer(["the food is good"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, stock(**batch).logits, rtol=1e-4, atol=1e-5)


def test_vectors_of_model_scope_are_scored_fused_and_exported_as_what_they_say(run, recipe):
    run("train both.yaml --method model")
    run("fuse runs/mood runs/thing --scaling 0.5 --out fused.safetensors")
    run("eval fused.safetensors --on runs/mood --on runs/thing --out fused.json")
    run("eval runs/mood runs/thing --fuse task_arithmetic --scaling 0.5 --out at-once.json")
    scores = [
        {name: of_task["score"] for name, of_task in json.loads(Path(file).read_text())["tasks"].items()}
        for file in ("fused.json", "at-once.json")
    ]
    assert scores[0] == scores[1]
    assert "another function" in run("export fused.safetensors --cast layer --out cast")
    assert "another function" in Path("cast/README.md").read_text()
    expected = formats.read("fused.safetensors").cast("layer").cast("weight")
    assert (formats.read("cast").cast("weight") - expected).norm() < 1e-6 * expected.norm()


def test_a_search_shows_every_point_beside_the_backbone_and_the_average(run, recipe):
    run("train both.yaml")
    output = run("eval runs/mood runs/thing --fuse task_arithmetic --search --set scaling=[0.1,0.5,1.0] --out s.json")
    table = output.split("search, validation %")[1].split("fused by")[0]
    rows = ("backbone", "average", "scaling 0.1", "scaling 0.5", "scaling 1.0")
    assert [row for row in rows if row not in table] == []
    assert table.count("←") == 1
    found = json.loads(Path("s.json").read_text())
    assert set(found["references"]) == {"backbone", "average"}
    assert Path("s.png").exists()
    same = run("eval runs/mood runs/thing --fuse average --out a.json")
    assert "average %" in same
    average = json.loads(Path("a.json").read_text())
    assert average["references"]["average"]["test"] == [of_task["score"] for of_task in average["tasks"].values()]


def test_a_run_is_uploaded_without_its_checkpoints(run, recipe, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            calls.append((repo_id, folder_path, "checkpoint-*/**" in ignore_patterns))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert "uploaded to https://hub/me/it-mood" in run("train both.yaml --push-to-hub me/it")
    assert ("me/it-thing", "runs/thing", True) in calls
    run("export runs/mood --out exported --push-to-hub me/exported")
    assert calls[-2:] == [("me/exported", True), ("me/exported", "exported", True)]


def test_the_hub_says_no_in_one_line(run, recipe, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to the hub\nand more")

    run("train both.yaml --task mood")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    result = CliRunner().invoke(cli.app, ["export", "runs/mood", "--out", "e", "--push-to-hub", "me/it"])
    assert result.exit_code == 2
    assert "--push-to-hub me/it: no route to the hub; log in with: hf auth login" in result.output
    assert Run.open("runs/mood").metrics["test"]
