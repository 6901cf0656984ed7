"""The recipes under examples/, on rows of the same columns and labels as their data sets have."""

from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture

from linlora.training import load_task, recipe
from linlora.training.data import load_split

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = Value("string")
NUMBER = Value("int32")


def glue(columns, label):
    return {**dict.fromkeys(columns, TEXT), "label": label, "idx": NUMBER}


GLUE = {
    "cola": glue(["sentence"], ClassLabel(names=["unacceptable", "acceptable"])),
    "mnli": glue(["premise", "hypothesis"], ClassLabel(names=["entailment", "neutral", "contradiction"])),
    "mrpc": glue(["sentence1", "sentence2"], ClassLabel(names=["not_equivalent", "equivalent"])),
    "qqp": glue(["question1", "question2"], ClassLabel(names=["not_duplicate", "duplicate"])),
    "rte": glue(["sentence1", "sentence2"], ClassLabel(names=["entailment", "not_entailment"])),
    "sst2": glue(["sentence"], ClassLabel(names=["negative", "positive"])),
    "stsb": glue(["sentence1", "sentence2"], Value("float32")),
}
CLIP = {"cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn"}


def test_there_are_no_recipes_but_those_tested_here():
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("*/*.yaml")} >= {
        "clip/clip.yaml",
        "glue/glue.yaml",
    }
    assert set(recipe(EXAMPLES / "glue/glue.yaml")) == set(GLUE)
    assert set(recipe(EXAMPLES / "clip/clip.yaml")) == CLIP


@pytest.mark.parametrize("name", GLUE)
def test_prompts_and_answers_of_glue(name, checkpoints, monkeypatch):
    settings = recipe(EXAMPLES / "glue/glue.yaml", [name], {"model": checkpoints["t5"]})[name]
    assert (settings.data.path, settings.data.config) == ("nyu-mll/glue", name)
    features = Features(GLUE[name])
    label = features["label"]
    labels = [0.0, 3.8, 5.0] * 4 if name == "stsb" else list(range(label.num_classes)) * 6
    content = {column: [f"{column} {i}" for i in range(len(labels))] for column in features if features[column] == TEXT}
    rows = Dataset.from_dict({**content, "label": labels, "idx": list(range(len(labels)))}, features=features)
    splits = {"train", "validation_matched" if name == "mnli" else "validation"}
    asked = []

    def load_dataset(path, config, split):
        asked.append(split)
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = load_task(settings)
    row = task.rows("test")[1]
    prompt = task.prompt(row)
    assert all(str(row[column]) in prompt for column in content)
    assert set(asked) == splits
    if name == "stsb":
        assert (task.answer_text(row), task.metric) == ("3.8", "spearman")
        assert task.read(" 3.8 out of 5") == 3.8
        return
    for i, of_label in enumerate(label.names):  # the words are those of the labels, in their order
        word = task.answer_text({"label": i})
        assert word == of_label.replace("_", " ")
        assert task.read(word.upper() + ".") == i
        assert word in prompt.replace("Answer", "")


@pytest.mark.parametrize("name", sorted(CLIP))
def test_classes_and_templates_of_clip(name, checkpoints, monkeypatch):
    settings = recipe(EXAMPLES / "clip/clip.yaml", [name], {"model": checkpoints["clip"]})[name]
    picture = Picture.fromarray(np.zeros((8, 8, 3), np.uint8))
    features = Features({"image": Image(), "label": ClassLabel(names=["red_film", "blue", "day"])})
    rows = Dataset.from_dict({"image": [picture] * 30, "label": [0, 1, 2] * 10}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda path, config, split: rows)
    task = load_task(settings)
    assert task.head.prototypes.shape == (3, 16)
    assert all("{}" in template for template in settings.templates)
    assert (settings.training["max_steps"], settings.training["warmup_steps"]) == (6000, 600)
    assert len(load_split(settings.data, "validation", ["image"])) == 3
