"""The comparison on the tasks of a recipe, and of adapters on them: tiny checkpoints and data sets, written here."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pickle
import re
import shlex
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging
from typer.testing import CliRunner

import linlora
from linlora import TaskVector
from linlora.cli import app
from linlora.experiments import Options, compare_adapters, compare_recipe, report
from linlora.experiments.adapters import AdapterComparison
from linlora.experiments.adapters_report import reading
from linlora.experiments.options import described
from linlora.experiments.recipes import RecipeExperiment
from linlora.quickstart import text
from linlora.testing import tiny_base, tiny_model
from linlora.training import Run, adapt, evaluate, load_task, plain_yaml, read_recipe, set_head
from linlora.training.suite import TaskSet

WORDS = ["<pad>", "<unk>", "good", "bad", "red", "blue", "film", "day", "is", "the"]
EXPERIMENT = {
    "seeds": 1, "methods": ["average", "ties", "adamerging", "lorahub", "regmean", "soup"],
    "learning_rates": {"model": 0.02}, "ties_keep": 0.5, "ties_scalings": [0.5, 1.0], "lorahub_budget": 2,
    "lorahub_examples": 4, "adamerging_initial": 0.3, "adamerging_steps": 1, "adamerging_batch": 4,
    "weights_scalings": 1.0, "regmean_examples": 8, "soup_examples": 4, "soup_epochs": 1, "soup_learning_rates": 1e-2,
    "negation_scalings": 1.0, "map_scalings": [0.0, 1.0],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny BERT, a tokenizer, and two tasks of two and of three classes, as a recipe names them."""
    logging.set_verbosity_error()
    place = tmp_path_factory.mktemp("recipe")
    tiny_base("bert").save_pretrained(place / "bert")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(place / "bert")
    rng = np.random.default_rng(0)
    for task, words in (("mood", ["good", "bad"]), ("colour", ["red", "blue", "the"])):
        for split, rows in (("train", 24), ("validation", 8), ("test", 12)):
            with (place / f"{task}-{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                for i in range(rows):
                    writer.writerow([f"{words[i % len(words)]} {rng.choice(WORDS[6:])}", words[i % len(words)]])
    (place / "recipe.yaml").write_text(f"""
model: {place}/bert
kind: classification
lora: {{r: 2, lora_alpha: 4, target_modules: [query, value]}}
training: {{max_steps: 3, per_device_train_batch_size: 8, learning_rate: 0.01, use_cpu: true}}
tasks:
  mood: {{data: {_data(place, "mood")}}}
  colour: {{data: {_data(place, "colour")}}}
""")
    return place


def _data(place, task):
    splits = ", ".join(f"{split}: {place}/{task}-{split}.csv" for split in ("train", "validation", "test"))
    return f"{{{splits}, text: text}}"


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take longer than all else here."""
    monkeypatch.setattr(report, "draw_all", lambda results, out: None)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module", autouse=True)
def _uncollected():
    """accelerate collects garbage after every training: seconds each, in a process that holds as much as pytest's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.gc.collect", lambda: 0)
        yield


@pytest.fixture(scope="module")
def finished(place):
    out = place / "run"
    results = compare_recipe(
        place / "recipe.yaml", out, overrides={"experiment": EXPERIMENT}, console=Console(quiet=True)
    )
    return out, results


def test_every_control_is_scored_by_every_method_with_the_heads_of_its_own_runs(finished):
    out, results = finished
    controls = results["starts"]["zero"]["controls"]
    assert list(controls) == ["factors", "delta_weight", "layer", "model"]
    for key, trained in (("factors", "lora"), ("delta_weight", "lora"), ("layer", "layer"), ("model", "model")):
        runs = [Run.open(out / "adapters" / "zero" / trained / task / "seed0") for task in ("mood", "colour")]
        assert controls[key]["single_by_seed_and_task"] == [[run.metrics["test"]["score"] for run in runs]]
        assert {run.settings.training["learning_rate"] for run in runs} == {0.02 if trained == "model" else 0.01}
        of_weights = set() if key in ("delta_weight", "layer") else {"regmean", "soup"}
        assert set(controls[key]["methods"]) == set(EXPERIMENT["methods"]) - of_weights
    assert (out / "scores.png").exists()
    assert not (out / "scalings.png").exists()  # task arithmetic was not asked for


@pytest.mark.parametrize("trained", ["layer", "model"])
def test_the_average_scores_what_it_does_in_the_model_of_linlora_training(finished, trained):
    out, results = finished
    runs = [Run.open(out / "adapters" / "zero" / trained / task / "seed0") for task in ("mood", "colour")]
    tasks = [load_task(run.settings) for run in runs]
    model = adapt(tasks[0], point=runs[0].vector).model
    linlora.apply(model, linlora.fuse([run.vector for run in runs], "average"))
    expected = []
    for run, task in zip(runs, tasks, strict=True):
        set_head(model, run.head)
        expected.append(evaluate(model, task, "test")["score"])
    found = results["starts"]["zero"]["controls"][trained]["methods"]["average"]["by_seed_and_task"]
    assert found == [pytest.approx(expected)]


def test_a_finished_comparison_is_found_and_a_missing_part_made(finished, place, tmp_path, console, undrawn):
    out = shutil.copytree(finished[0], tmp_path / "run")
    for settings in out.rglob("settings.yaml"):  # the folders of the runs have moved
        settings.write_text(settings.read_text().replace(str(finished[0]), str(out)))
    shutil.rmtree(out / "fused" / "zero" / "layer")
    results = compare_recipe(place / "recipe.yaml", out, overrides={"experiment": EXPERIMENT}, console=console)
    printed = console.file.getvalue()
    assert "trained" not in printed
    assert printed.count("fused linearized, layer scope") == 1
    assert json.loads(json.dumps(results["starts"])) == json.loads(json.dumps(finished[1]["starts"]))


def test_a_comparison_is_not_continued_with_rows_that_have_changed(place, tmp_path, console):
    content = plain_yaml.read(place / "recipe.yaml")
    rows = tmp_path / "train.csv"
    shutil.copy(content["tasks"]["mood"]["data"]["train"], rows)
    content["tasks"]["mood"]["data"]["train"] = str(rows)
    (tmp_path / "recipe.yaml").write_text(plain_yaml.dump(content))

    def fingerprint():
        tasks = read_recipe(tmp_path / "recipe.yaml").tasks
        return RecipeExperiment(tasks, tmp_path / "run", Options(), {}).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    rows.write_text(rows.read_text().replace("good", "bad!"))
    assert {key for key, value in fingerprint().items() if value != before[key]} == {"files"}


def test_methods_that_see_few_rows_see_every_class_of_a_sorted_file(place, tmp_path):
    rows = [f"{word} film,{word}" for word in ("good", "bad") for _ in range(40)]
    (tmp_path / "sorted.csv").write_text("\n".join(["text,label", *rows]))
    settings = read_recipe(place / "recipe.yaml").tasks["mood"]
    data = dataclasses.replace(settings.data, validation=str(tmp_path / "sorted.csv"))
    tasks = TaskSet({"mood": load_task(dataclasses.replace(settings, data=data))}, {})
    (few,) = tasks.labeled(8, 16)
    labels = [label for batch in few for label in batch["labels"].tolist()]
    assert len(labels) == 16
    assert 2 < sum(labels) < 14
    for _ in range(2):  # the same rows every time
        assert [label for batch in tasks.labeled(8, 16)[0] for label in batch["labels"].tolist()] == labels


def test_a_point_that_is_not_at_zero_brings_lora_fa(place, tmp_path, console, undrawn):
    point = TaskVector.from_model(tiny_model("bert", True, r=2, lora_alpha=4, target_modules=["query", "value"]))
    point.save(tmp_path / "point.safetensors")
    experiment = {"seeds": 1, "methods": ["average"], "negation_scalings": [1.0], "map_scalings": []}
    point = {"point": str(tmp_path / "point.safetensors"), "training": {"max_steps": 1}, "experiment": experiment}
    results = compare_recipe(place / "recipe.yaml", tmp_path / "run", overrides=point, console=console)
    assert list(results["starts"]["warm"]["controls"]) == ["factors", "delta_weight", "lora_fa", "layer", "model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "sgd=1"], "the methods are lora, lora-fa, layer, model"),
        (["--method", "slerp"], "choose from average"),
        (["--set", "ties_kep=[0.1]"], "did you mean 'ties_keep'"),
    ],
)
def test_bad_flags_end_the_command_with_one_line(place, tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["compare", str(place / "recipe.yaml"), "--out", str(tmp_path / "x"), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"seed": 1}, "experiment: unknown key 'seed'; did you mean"),
        ({"seeds": 0}, "seeds is a whole number"),
        ({"learning_rates": 1e-3}, "'method: rate' lines"),
        ({"learning_rates": {"model": True}}, r"learning_rates.model: expected a number"),
        ({"learning_rates": {"sgd": 1.0}}, "the methods are lora, lora-fa, layer, model"),
        ({"ties_keep": "often"}, "ties_keep: expected numbers"),
        ({"methods": ["slerp"]}, "choose from average"),
    ],
)
def test_the_section_experiment_of_a_recipe_is_checked(place, tmp_path, console, section, message):
    with pytest.raises(ValueError, match=message):
        compare_recipe(place / "recipe.yaml", tmp_path / "run", console=console, overrides={"experiment": section})
    assert not (tmp_path / "run").exists()


def test_the_section_experiment_says_seeds_methods_and_rates():
    section = {"seeds": 1, "methods": ["ties"], "ties_keep": [0.1], "learning_rates": {"model": 1e-3}}
    seeds, options, rates = described(section, "recipe.yaml")
    assert (seeds, options.methods, options.ties_keep, rates) == (1, ("ties",), (0.1,), {"model": 1e-3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"r": 4}}, "do not share one model: lora.r"),
        ({"data": {"test": None}}, "no test split"),
        ({"data": {"test": "rows.csv", "validation": "rows.csv"}}, "validation and test are both 'rows.csv'"),
    ],
)
def test_tasks_that_cannot_be_compared_are_refused(place, tmp_path, console, change, message):
    content = plain_yaml.read(place / "recipe.yaml")
    for section, values in change.items():
        content["tasks"]["colour"].setdefault(section, {}).update(values)
    (tmp_path / "recipe.yaml").write_text(plain_yaml.dump(content))
    with pytest.raises(ValueError, match=message):
        compare_recipe(tmp_path / "recipe.yaml", tmp_path / "run", console=console)
    assert not (tmp_path / "run").exists()


def test_a_process_group_is_refused(place, tmp_path, console, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        compare_recipe(place / "recipe.yaml", tmp_path / "run", console=console)


def test_the_heads_of_other_sizes_fit_a_plain_model(finished):
    """TIES of ΔW acts on a plain model, whose head is put in by name."""
    (scores,) = finished[1]["starts"]["zero"]["controls"]["delta_weight"]["methods"]["ties"]["by_seed_and_task"]
    assert all(0.0 <= score <= 1.0 for score in scores)
    assert torch.tensor(scores).isfinite().all()


FEW = Options(
    methods=("average", "task_arithmetic", "ties", "tsv", "regmean"), scalings=(0.3, 1.0), weights_scalings=(1.0,),
    ties_keep=(0.5,), ties_scalings=(1.0,), regmean_examples=8,
)  # fmt: skip


@pytest.fixture
def runs(finished):
    return finished[0] / "adapters" / "zero"


def test_adapters_of_any_kind_are_compared_as_what_they_add_to_the_weights(finished, runs, tmp_path, console):
    adapters = [str(runs / "lora" / "mood" / "seed0"), str(runs / "layer" / "colour" / "seed0")]
    results = compare_adapters(adapters, out=tmp_path / "run", options=FEW, console=console)
    assert results["scope"] == "weight"
    assert list(results["rows"]) == [
        "backbone",
        "adapter-1",
        "adapter-2",
        "average",
        "task_arithmetic",
        "tsv",
        "regmean",
    ]
    assert list(results["left_out"]) == ["ties"]
    assert results["single"]["test"] == [Run.open(adapter).metrics["test"]["score"] for adapter in adapters]
    for fused in ("average", "tsv", "regmean"):
        vector = tmp_path / "run" / "rows" / fused / "task_vector.safetensors"
        assert evaluated(adapters, vector) == pytest.approx(results["rows"][fused]["test"])
    printed = " ".join(console.file.getvalue().split())
    assert "Recommended: " in printed
    assert "only task arithmetic gains reliably" in printed
    again = compare_adapters(adapters, out=tmp_path / "run", options=FEW, console=console)
    assert again["jobs"]["made"] == 0
    assert again["rows"] == json.loads(json.dumps(results["rows"]))


def evaluated(runs, vector):
    """The scores of a vector in a file, by the code of `linlora eval`."""
    from linlora.experiments.evaluation import evaluate_vector
    from linlora.experiments.judges import judges

    result = evaluate_vector(linlora.formats.read(vector), judges(runs), "test")
    return [of_task["score"] for of_task in result["tasks"].values()]


@pytest.mark.parametrize("kind", ["layer", "model"])
def test_linearized_adapters_of_one_point_are_compared_there(runs, tmp_path, console, kind):
    adapters = [str(runs / kind / task / "seed0") for task in ("mood", "colour")]
    results = compare_adapters(adapters, out=tmp_path / "run", options=FEW, console=console)
    assert results["scope"] == kind
    assert "ties" in results["rows"]
    assert list(results["left_out"]) == (["tsv"] if kind == "layer" else ["tsv", "regmean"])


def test_the_command_it_recommends_works_as_printed(runs, tmp_path, console, monkeypatch):
    adapters = [str(runs / "lora" / task / "seed0") for task in ("mood", "colour")]
    options = dataclasses.replace(FEW, methods=("tsv",))
    results = compare_adapters(adapters, out=tmp_path / "run", options=options, console=console)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(results["recommendation"]["command"])
    assert program == "linlora"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert evaluated(adapters, "fused.safetensors") == pytest.approx(results["rows"]["tsv"]["test"])


def test_a_scaling_of_zero_is_read_as_the_base_model():
    scores = {"backbone": {"test": [0.5]}, "task_arithmetic": {"test": [0.5], "options": {"scaling": 0.0}}}
    results = {"rows": scores, "single": {"test": [0.75]}, "recommendation": {"method": "task_arithmetic"}}
    assert "the base model without adapters" in reading(results)
    assert "it is recommended unless" not in reading(results)


def test_a_method_that_has_seen_labels_says_so():
    row = {"test": [0.5], "options": {"epochs": 1}}
    results = {
        "rows": {"backbone": row, "soup": row}, "single": {"test": [0.75]}, "options": {"soup_examples": 64},
        "recommendation": {"method": "soup", "command": "linlora export"},
    }  # fmt: skip
    assert "fitted to 64 of the labels it was chosen by" in reading(results)


def test_experiments_go_to_workers_without_what_they_have_loaded(place, runs, tmp_path):
    tasks = read_recipe(place / "recipe.yaml").tasks
    adapters = [str(runs / "lora" / task / "seed0") for task in ("mood", "colour")]
    recipe = RecipeExperiment(tasks, tmp_path, Options(), {})
    comparison = AdapterComparison(adapters, [], tmp_path, Options())
    assert recipe.base("lora") is not None
    assert comparison.space.model is not None
    for experiment in (recipe, comparison):
        sent = pickle.dumps(experiment)
        assert len(sent) < 20_000
        assert pickle.loads(sent).fingerprint() == experiment.fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{lora}/mood/seed0"], "two adapters or more, got 1"),
        (["{lora}/mood/seed0", "no-such-thing"], "no such file or folder, and no name of the Hugging Face hub"),
        (["{lora}/mood/seed0", "{model}/colour/seed0"], "model.*scope 'model'"),
        (["{lora}/mood/seed0", "{lora}/colour/seed0", "--base", "org/b"], "of the base model 'org/b', and task 'mood'"),
        (["{lora}/mood/seed0", "{lora}/colour/seed0", "--learning-rate", "lora=1"], "is for a recipe"),
        (["recipe.yaml", "--on", "recipe.yaml"], "name adapters"),
        (["{lora}/mood/seed0", "{lora}/colour/seed0", "--seeds", "5"], "trained already"),
        (["recipe.yaml", "--device", "cuda"], "--device is of the packaged tasks"),
    ],
)
def test_adapters_that_cannot_be_compared_are_refused(runs, tmp_path, arguments, message):
    names = [argument.format(lora=runs / "lora", model=runs / "model") for argument in arguments]
    result = CliRunner().invoke(app, ["compare", *names, "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def of_text(place):
    """The packaged recipe of texts, cut short, on an encoder and tasks in folders."""
    recipe = plain_yaml.read(text.RECIPE)
    recipe["training"] |= {"max_steps": 3}
    recipe["data"] |= {"validation": 6}
    recipe["lora"] |= {"r": 2}
    recipe["experiment"] |= {"scalings": [0.0, 0.5, 1.0]}
    (place / "text.yaml").write_text(plain_yaml.dump(recipe))
    for task in ("mood", "colour"):
        for split in ("train", "test"):
            (place / task).mkdir(exist_ok=True)
            shutil.copy(place / f"{task}-{split}.csv", place / task / f"{split}.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "RECIPE", place / "text.yaml")
        patch.setattr(report, "draw_all", lambda results, out: None)
        given = {"model": str(place / "bert"), "tasks": [place / "mood", place / "colour"], "workers": 1}
        results = text.run(place / "text", seeds=1, console=Console(quiet=True), **given)
        again = text.run(place / "text", seeds=1, console=Console(quiet=True), **given)
    return place / "text", results, again


def test_the_quickstart_of_texts_continues_in_its_folder(of_text):
    _, results, again = of_text
    assert results["tasks"] == ["mood", "colour"]
    assert again["jobs"]["made"] == 0
    assert again["starts"] == json.loads(json.dumps(results["starts"]))


@pytest.mark.parametrize(("key", "end"), [("model", "scores"), ("features", "features")])
def test_model_scope_is_tried_with_both_ends_where_the_recipe_leaves_it_open(of_text, key, end):
    out, results, _ = of_text
    controls = results["starts"]["zero"]["controls"]
    assert list(controls) == ["factors", "delta_weight", "layer", "model", "features"]
    runs = [Run.open(out / "adapters" / "zero" / key / task / "seed0") for task in results["tasks"]]
    assert {(run.settings.ends_at, run.settings.training["learning_rate"]) for run in runs} == {(end, 3e-3)}
    tasks = [load_task(run.settings) for run in runs]
    model = adapt(tasks[0], point=runs[0].vector).model
    linlora.apply(model, linlora.fuse([run.vector for run in runs], "task_arithmetic", scaling=1.0))
    expected = [evaluate(model, task, "test")["score"] for task in tasks]
    assert controls[key]["methods"]["sum"]["by_seed_and_task"] == [pytest.approx(expected)]


def test_the_two_ends_are_two_functions(of_text):
    out, *_ = of_text
    logits = []
    for key in ("model", "features"):
        run = Run.open(out / "adapters" / "zero" / key / "mood" / "seed0")
        task = load_task(run.settings)
        model = adapt(task, point=run.vector).model
        linlora.apply(model, 50.0 * Run.open(out / "adapters" / "zero" / "model" / "mood" / "seed0").vector)
        with torch.no_grad():
            logits.append(task.logits(model, task.inputs([{"text": "good day", "label": "good"}])))
    assert logits[1].abs().max() <= 16.001  # prototypes and features are normalised
    assert not torch.allclose(*logits, atol=0.1)


def test_without_a_network_the_quickstart_of_texts_says_so_in_a_line(tmp_path, monkeypatch):
    def refuse(request, timeout):
        raise URLError("no name server")

    monkeypatch.setattr(text, "urlopen", refuse)
    result = CliRunner().invoke(app, ["quickstart", "--text", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "out of reach" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_two_tasks_of_one_name_are_refused_where_one_would_be_left_out(tmp_path):
    folders = [tmp_path / place / task for place, task in (("a", "mood"), ("b", "mood"), ("a", "colour"))]
    with pytest.raises(ValueError, match=r"two folders of --task have one name"):
        text.run(tmp_path / "run", model=str(tmp_path), tasks=folders)


def test_flags_of_the_quickstart_of_texts_are_for_it():
    result = CliRunner().invoke(app, ["quickstart", "--model", "bert"])
    assert result.exit_code == 2
    assert "--model and --task are for --text" in result.stderr
    result = CliRunner().invoke(app, ["quickstart", "--text", "--device", "cuda:1"])
    assert result.exit_code == 2
    assert "CUDA_VISIBLE_DEVICES=1" in result.stderr
