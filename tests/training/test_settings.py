"""Settings and recipes: what a file says, what flags change, and what is refused."""

import pytest

from linlora.training import Data, Settings, plain_yaml, recipe
from linlora.training.recipe import nested

MINIMAL = {"model": "gpt2", "kind": "text-to-text", "data": {"path": "qa.csv"}, "prompt": "{q}"}


def write(path, content):
    path.write_text(content if isinstance(content, str) else plain_yaml.dump(content))
    return path


def test_a_file_and_its_settings_are_one_another(tmp_path):
    path = tmp_path / "rte.yaml"
    settings = Settings(
        "google/flan-t5-base", "text-to-text", Data("nyu-mll/glue", "rte", validation=0.1, test="validation"),
        prompt="{sentence1} so {sentence2}?", answers=("yes", "no"), method="model", seed=3,
        lora={"r": 8, "target_modules": ["q", "v"]}, training={"learning_rate": 1e-5, "max_steps": 20},
    )  # fmt: skip
    settings.to_yaml(path)
    assert Settings.from_yaml(path) == settings
    assert (settings.name, settings.out) == ("rte", "runs/rte")
    assert settings.lora["lora_alpha"] == 16  # twice the rank, unless given


@pytest.mark.parametrize(
    ("given", "name", "out"),
    [
        ({}, "qa", "runs/qa"),
        ({"data": {"path": "qa.csv", "config": "rte"}}, "rte", "runs/rte"),
        ({"name": "mood"}, "mood", "runs/mood"),
        ({"out": "runs/topic"}, "topic", "runs/topic"),
        ({"out": "runs/topic/"}, "topic", "runs/topic/"),
        ({"out": "runs/topic/."}, "topic", "runs/topic/."),
        ({"out": "runs/topic", "name": "mood"}, "mood", "runs/topic"),
        ({"out": "/"}, "qa", "/"),
    ],
)
def test_a_run_is_named_by_its_folder_then_by_its_data(given, name, out):
    settings = Settings.from_dict({**MINIMAL, **given})
    assert (settings.name, settings.out) == (name, out)
    assert settings.changed(out="elsewhere").name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, r"unknown key 'modle'; did you mean 'model'\?$"),
        ({"zzz": 1}, r"unknown key 'zzz'; the keys are model, kind, data, .*, model_options$"),
        ({"data": {"zzz": 1}}, r"data: unknown key 'zzz'; the keys are path, config, .*, label$"),
        ({"lora": {"zzz": 1}}, r"lora: unknown key 'zzz'; its \d+ keys are the fields of peft.LoraConfig, which"),
        (
            {"training": {"zzz": 1}},
            r"unknown key 'zzz'; its \d+ keys are the fields of transformers.TrainingArguments,",
        ),
        ({"data": {"path": "qa.csv", "test": 0.2}}, r"got 0.2; to hold rows out .* data.test 'train\[80%:\]'$"),
        ({"data": {"path": "qa.csv", "test": 5}}, "data.test is a split, a file or false, got 5; to hold rows out"),
        ({"model": None}, "rte.yaml: model is missing"),
        ({"data": {"path": "qa.csv", "lable": "y"}}, "data: unknown key 'lable'; did you mean 'label'"),
        ({"data": "qa.csv"}, "data is a section"),
        ({"lora": {"rank": 4}}, "lora: unknown key 'rank'"),
        ({"lora": {"r": 0}}, "lora.r is a whole number, 1 or more, got 0"),
        ({"lora": {"lora_alpha": float("nan")}}, "lora.lora_alpha is a number other than 0, got nan"),
        ({"lora": {"lora_dropout": -1}}, "lora.lora_dropout is a number, 0 or more and below 1, got -1"),
        (
            {"training": {"max_steps": 0}},
            "training.max_steps is a whole number, 1 or more, or -1 with num_train_epochs",
        ),
        ({"training": {"num_train_epochs": 0}}, "training.num_train_epochs is a number above 0, got 0"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate is a number, 0 or more, got nan"),
        ({"training": {"gradient_accumulation_steps": 1.5}}, "gradient_accumulation_steps is a whole number"),
        ({"seed": 2**32}, r"seed is a whole number, 0 or more and below 2\^32"),
        ({"lora": {"task_type": "CAUSAL_LM"}}, "lora.task_type follows from the other settings"),
        ({"training": {"max_step": 4}}, "training: unknown key 'max_step'; did you mean 'max_steps'"),
        ({"training": {"max_steps": True}}, "training.max_steps is a whole number"),
        ({"training": {"save_only_model": True}}, "training.save_only_model is not set here; set nothing: a run"),
        ({"training": {"output_dir": "x"}}, "training.output_dir is not set here; set out"),
        ({"training": 4}, "training is a section"),
        ({"kind": "tagging"}, "kind is one of classification, text-to-text, zero-shot, got 'tagging'"),
        ({"method": "full"}, "method is one of lora, lora-fa, layer, model, got 'full'"),
        ({"method": None}, "method is one of lora, lora-fa, layer, model, got None"),
        ({"max_length": None}, "max_length is a whole number, 1 or more, got None"),
        ({"data": {"path": "qa.csv", "label": None}}, "data.label is a text, got None"),
        ({"lora": None}, "lora is a section of 'key: value' lines, got None"),
        ({"head": "none"}, "head is one of trained, frozen, prototypes, got 'none'"),
        ({"prompt": None}, "kind 'text-to-text' needs prompt"),
        ({"kind": "classification"}, "needs one of the two, data.text or data.image"),
        ({"kind": "zero-shot"}, "needs data.image"),
        ({"kind": "zero-shot", "data": {"path": "x", "image": "image"}, "templates": ["a photo"]}, r"needs a \{\}"),
        ({"answers": [1, 2]}, r"answers is a list of texts \(quote numbers\), got \[1, 2\]"),
        ({"seed": "one"}, "seed is a whole number"),
        (
            {"data": {"path": "qa.csv", "validation": 1.5}},
            "validation is a split, a file, or how many rows .* got 1.5",
        ),
        ({"data": {"train": "train"}}, "data.path is missing"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_dict({**MINIMAL, **change}, "rte.yaml")


def test_an_error_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"rte\.yaml: kind is one of"):
        Settings.from_yaml(write(tmp_path / "rte.yaml", {**MINIMAL, "kind": "?"}))
    with pytest.raises(ValueError, match=r"broken\.yaml, line 2"):
        Settings.from_yaml(write(tmp_path / "broken.yaml", "model: [a,\nb: }"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        recipe(tmp_path / "missing.yaml")


@pytest.mark.parametrize("content", ["", "\n\n", "# later\n", "---\n", "~"])
def test_a_file_without_a_key_is_called_empty(tmp_path, content):
    with pytest.raises(ValueError, match=r"empty\.yaml is empty: expected 'key: value' lines"):
        recipe(write(tmp_path / "empty.yaml", content))


def test_numbers_and_words_are_read_as_yaml_1_2_has_them():
    words = "c: no, d: 'no', g: ~, i: on, m: 2020-01-01"
    text = "{a: 1e-5, b: 1.0E+2, e: true, f: 07, h: -3, j: 1_000, k: .5, l: .inf, " + words + "}"
    assert plain_yaml.parse(text) == {
        "a": 1e-5, "b": 100.0, "c": "no", "d": "no", "e": True, "f": 7, "g": None, "h": -3, "i": "on", "j": 1000,
        "k": 0.5, "l": float("inf"), "m": "2020-01-01",
    }  # fmt: skip


def test_a_recipe_shares_what_its_tasks_do_not_change(tmp_path):
    content = {
        **MINIMAL, "out": "runs/qa", "training": {"max_steps": 10, "learning_rate": 1e-4},
        "tasks": {"a": {"data": {"label": "x"}}, "b": {"training": {"max_steps": 20}}},
    }  # fmt: skip
    path = write(tmp_path / "qa.yaml", content)
    found = recipe(path, overrides=nested([("training.learning_rate", 1e-3), ("lora.r", 2), ("out", "else")]))
    a, b = found["a"], found["b"]
    assert (a.data.path, a.data.label, a.out, a.name) == ("qa.csv", "x", "else/a", "a")
    assert (a.training["max_steps"], b.training["max_steps"]) == (10, 20)
    assert a.training["learning_rate"] == b.training["learning_rate"] == 1e-3
    assert b.lora["r"] == 2
    assert list(recipe(path, ["b"])) == ["b"]
    with pytest.raises(ValueError, match="no task 'c'; its tasks are a, b"):
        recipe(path, ["c"])
    with pytest.raises(ValueError, match="task 'b': unknown key 'promt'"):
        recipe(write(path, {**content, "tasks": {"b": {"promt": "?"}}}))
    with pytest.raises(ValueError, match="holds one task"):
        recipe(write(path, MINIMAL), ["a"])


def test_epochs_are_not_cut_short_by_the_default_number_of_steps():
    settings = Settings.from_dict({**MINIMAL, "training": {"num_train_epochs": 2}})
    assert "max_steps" not in settings.training


MULTIPLYING = {
    "merge keys": ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 4)}]" for i in range(1, 40)],
    "lists": ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)],
    "an alias of what it is in": ["a: &a", "  <<: *a", "  b: 1"],
}


@pytest.mark.parametrize("lines", MULTIPLYING.values(), ids=list(MULTIPLYING))
def test_aliases_that_multiply_are_refused(lines, tmp_path):
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"recipe\.yaml, line \d+: aliases make more than 100,000 values"):
        plain_yaml.read(tmp_path / "recipe.yaml")


def test_aliases_that_do_not_are_read():
    text = "base: &base {r: 4, seed: 1}\nrun: {<<: *base, seed: 2}\nboth: [*base, *base]"
    assert plain_yaml.parse(text)["run"] == {"r": 4, "seed": 2}
    with pytest.raises(ValueError, match=r"YAML: Exceeds the limit"):
        plain_yaml.parse("9" * 10_000)
