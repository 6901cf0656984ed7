"""Scores of vectors, alone and fused, on the tasks of a suite."""

import shutil
from dataclasses import replace

import pytest
import torch
import transformers

import linlora
from linlora.experiments.evaluation import evaluate_alone, evaluate_fused, evaluate_vector, searched
from linlora.experiments.judges import Judge, judges
from linlora.training import Data, Suite, adapt, evaluate, load_task, train
from linlora.training.metrics import class_scores
from linlora.vectors.common_space import in_one_space


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def runs(settings, made, review_files):
    """Two classifiers of one point, of two and of three classes."""
    training = {"max_steps": 2, "learning_rate": 3e-2}
    mood = train(settings("text", out=str(made / "mood"), name="mood", training=training))
    data = Data(review_files, test="test", text=("text",), label="thing")
    return [mood, train(settings("text", out=str(made / "thing"), name="thing", data=data, training=training))]


def test_scores_are_those_of_the_rows_one_by_one(settings):
    task = load_task(settings("image"))
    model = adapt(task).model.eval()
    rows = [task.rows("test")[i] for i in range(len(task.rows("test")))]
    with torch.no_grad():
        predicted = [int(model(**task.inputs([row])).logits.argmax()) for row in rows]
    expected = class_scores(predicted, [row["label"] for row in rows], classes=2)
    model.train()
    found = evaluate(model, task, "test")
    assert model.training  # as it was
    assert {name: found[name] for name in expected} == expected
    assert (found["rows"], found["score"]) == (12, found["accuracy"])
    assert evaluate(model, task, "test", limit=5)["rows"] == 5


def test_logits_of_a_causal_model_are_those_of_the_prompts_one_by_one(settings, checkpoints, tmp_path):
    """Also where it counts positions from the start of a row: prompts of a batch are padded at their start."""
    transformers.AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(tmp_path / "gpt2")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, **sizes)).save_pretrained(tmp_path / "gpt2")
    task = load_task(settings("causal", model=str(tmp_path / "gpt2"), lora={"target_modules": ["c_attn"]}))
    model = adapt(task).model.eval()
    rows = [{"text": text, "label": 0} for text in ("a good film", "bad", "good and good and good")]
    with torch.no_grad():
        one_by_one = [task.logits(model, task.inputs([row])) for row in rows]
        torch.testing.assert_close(task.logits(model, task.inputs(rows)), torch.cat(one_by_one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("own", [None, 5, [5, 6]])
def test_an_answer_ends_where_it_was_trained_to_end_whatever_ends_the_checkpoint_knows(
    settings, monkeypatch, kind, own
):
    task = load_task(settings(kind))
    model = adapt(task).model
    base = model.get_base_model()
    base.generation_config.eos_token_id = own
    asked, generate = [], base.generate
    monkeypatch.setattr(base, "generate", lambda **options: asked.append(options) or generate(**options))
    assert len(task.predict(model, task.inputs([{"text": "good", "label": 0}]))) == 1
    assert asked[0]["eos_token_id"] == sorted({task.tokenizer.eos_token_id} | set([own] if own == 5 else own or []))


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_answers_are_greedy_whatever_a_checkpoint_says_of_decoding(settings, checkpoints, tmp_path, kind):
    plain = load_task(settings(kind, max_new_tokens=6))
    own = transformers.GenerationConfig.from_pretrained(plain.settings.model)
    own.update(repetition_penalty=50.0, min_new_tokens=6, no_repeat_ngram_size=1, do_sample=True, top_k=5)
    shutil.copytree(plain.settings.model, tmp_path / "odd")
    own.save_pretrained(tmp_path / "odd")
    odd = load_task(settings(kind, model=str(tmp_path / "odd"), max_new_tokens=6))
    rows, read = [plain.rows("train")[i] for i in range(4)], []
    for task in (plain, odd):
        task.read = lambda text: text
        read.append(task.predict(adapt(task).model.eval(), task.inputs(rows)))
    assert read[0] == read[1]


def test_answers_start_and_end_with_the_tokens_of_the_checkpoint(settings, tmp_path):
    own = transformers.GenerationConfig.from_pretrained(settings("seq2seq").model)
    tokens = {"bos_token_id": 7, "decoder_start_token_id": 9, "forced_bos_token_id": 8, "forced_eos_token_id": 1}
    own.update(**tokens)
    shutil.copytree(settings("seq2seq").model, tmp_path / "odd")
    own.save_pretrained(tmp_path / "odd")
    model = load_task(settings("seq2seq", model=str(tmp_path / "odd"))).base_model()
    assert {name: getattr(model.generation_config, name) for name in tokens} == tokens


@pytest.mark.parametrize(
    ("kind", "config", "target"),
    [
        (transformers.GPT2ForSequenceClassification, {"n_embd": 16, "n_layer": 1, "n_head": 2}, "c_attn"),
        (transformers.XLNetForSequenceClassification, {"d_model": 16, "n_layer": 1, "n_head": 2}, "layer_1"),
    ],
    ids=["absolute positions", "classified by the last token"],
)
def test_texts_are_classified_alike_in_every_batch(settings, checkpoints, tmp_path, kind, config, target):
    """A tokenizer that pads in front would move the positions of the shorter ones; XLNet reads the last token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints["bert"], padding_side="left")
    model = kind(kind.config_class(vocab_size=64, initializer_range=0.5, pad_token_id=0, **config))
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "left")
    task = load_task(settings("text", model=str(tmp_path / "left"), lora={"target_modules": [target]}))
    model = task.base_model()
    rows = [{"text": text, "label": 0} for text in ("a good film", "bad", "good and good and good")]
    with torch.no_grad():
        one_by_one = [task.logits(model, task.inputs([row])) for row in rows]
        torch.testing.assert_close(task.logits(model, task.inputs(rows)), torch.cat(one_by_one), rtol=1e-4, atol=1e-4)


def test_prototypes_are_the_normalised_means_of_the_texts(settings, checkpoints):
    task = load_task(settings("zero-shot"))
    clip = transformers.AutoModel.from_pretrained(checkpoints["clip"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints["clip"])
    rows = [task.rows("test")[i] for i in range(6)]
    with torch.no_grad():
        classes = []
        for name in ("blue", "red"):
            sentences = [template.replace("{}", name) for template in task.settings.templates]
            texts = clip.get_text_features(**tokenizer(sentences, return_tensors="pt", padding=True))
            texts = getattr(texts, "pooler_output", texts)
            classes.append(torch.nn.functional.normalize(texts, dim=-1).mean(0))
        images = clip.get_image_features(**task.inputs(rows))
        images = getattr(images, "pooler_output", images)
        prototypes = torch.nn.functional.normalize(torch.stack(classes), dim=-1)
        logits = clip.logit_scale.exp() * torch.nn.functional.normalize(images, dim=-1) @ prototypes.T
        torch.testing.assert_close(task.logits(adapt(task).model, task.inputs(rows)), logits)


def test_zero_shot_needs_names_for_its_classes(settings, tmp_path, image_folder):
    from datasets import Dataset, Image

    paths = [f"{image_folder}/train/{colour}/0.png" for colour in ("red", "blue")] * 4
    rows = Dataset.from_dict({"image": paths, "label": [1, 0] * 4}).cast_column("image", Image())
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    data = Data(str(tmp_path / "rows.parquet"), validation=2, image="image")
    with pytest.raises(ValueError, match="numbers without names, which say nothing to a text tower; list class_names"):
        load_task(settings("zero-shot", data=data))
    task = load_task(settings("zero-shot", data=data, class_names=("blue", "red")))
    assert task.classes.names == ("blue", "red")
    with pytest.raises(ValueError, match="column 'image' holds str, not images"):
        task.inputs([{"image": "red.png"}])


def test_classes_that_the_text_tower_cannot_tell_apart_are_refused(settings):
    with pytest.raises(ValueError, match="the classes 'azure' and 'scarlet' one prototype"):
        _ = load_task(settings("zero-shot", class_names=("azure", "scarlet"))).head  # both unknown to the tokenizer


def test_a_suite_scores_each_task_with_its_own_head(runs):
    tasks = {run.settings.name: load_task(run.settings) for run in runs}
    suite = Suite(tasks, runs[0].vector, {run.settings.name: run.head for run in runs})
    for run in runs:
        suite.put(run.vector)
        assert suite.evaluate(suite.model, "test")[run.settings.name] == run.metrics["test"]
    batches = suite.unlabeled(3, "validation", limit=5)
    assert [[len(batch["inputs"]["input_ids"]) for batch in of_task] for of_task in batches] == [[3, 2], [3, 2]]
    assert [suite.logits(suite.model, next(iter(of_task))).shape for of_task in batches] == [(3, 2), (3, 3)]


def test_a_suite_needs_one_model_and_every_head(runs, settings):
    tasks = {run.settings.name: load_task(run.settings) for run in runs}
    with pytest.raises(ValueError, match="task 'thing' has a head that was trained; name the folder of its run"):
        Suite(tasks, runs[0].vector, {"mood": runs[0].head})
    other = load_task(settings("text", name="other", lora={"r": 2}))
    with pytest.raises(ValueError, match=r"'mood' and 'other' do not share one model: lora.r: 4 and 2"):
        Suite({"mood": tasks["mood"], "other": other}, runs[0].vector, {"mood": runs[0].head})
    with pytest.raises(linlora.DifferentPointError, match=r"of the base model 'org/b', and task 'mood' of .*--base "):
        evaluate_vector(replace(runs[0].vector, base_model="org/b"), [Judge(runs[0].settings, runs[0])], "test")
    judge = Judge(runs[0].settings, runs[0])
    with pytest.raises(ValueError, match=r"/mood is given twice"):
        evaluate_vector(runs[0].vector, [judge, judge], "test")
    with pytest.raises(ValueError, match=r"two tasks are named 'mood'; name one of them: linlora train .* --set name="):
        evaluate_vector(runs[0].vector, [judge, Judge(runs[0].settings)], "test")


def test_fused_scores_are_normalised_by_those_of_the_runs(runs):
    tasks = judges([run.folder for run in runs])
    vectors = [run.vector for run in runs]
    result = evaluate_fused(vectors, tasks, "test", "task_arithmetic", {"scaling": 0.5})
    ratios = []
    suite = Suite(
        {r.settings.name: load_task(r.settings) for r in runs}, vectors[0], {r.settings.name: r.head for r in runs}
    )
    suite.put(0.5 * (vectors[0] + vectors[1]))
    expected = suite.evaluate(suite.model, "test")
    for run in runs:
        of_task = result["tasks"][run.settings.name]
        assert of_task["score"] == expected[run.settings.name]["score"]
        assert of_task["single"] == run.metrics["test"]["score"]
        ratios.append(of_task["score"] / of_task["single"])
        assert of_task["normalised"] == ratios[-1]
    assert result["mean"]["normalised"] == pytest.approx(sum(ratios) / 2)
    alone = evaluate_alone(tasks, "test")
    assert [of_task["score"] for of_task in alone["tasks"].values()] == [run.metrics["test"]["score"] for run in runs]


def test_vectors_in_weight_space_are_scored_in_an_adapter_of_their_layers_and_ranks(runs):
    """At B0 = 0 layer scope is linear in ΔW, so the two fusions are one function."""
    tasks = judges([run.folder for run in runs])
    vectors = [run.vector for run in runs]
    expected = evaluate_fused(vectors, tasks, "test", "task_arithmetic", {"scaling": 0.5})
    mixed, _ = in_one_space([vectors[0], vectors[1].cast("weight")], ["mood", "thing"])
    for given in ([vector.cast("weight") for vector in vectors], mixed):
        result = evaluate_fused(given, tasks, "test", "task_arithmetic", {"scaling": 0.5})
        assert result["mean"]["score"] == pytest.approx(expected["mean"]["score"], abs=1e-6)
    found = evaluate_fused(given, tasks, "test", "tsv", {"scaling": [0.5, 1.0], "out_rank": 2}, searched=True)
    assert len(found["search"]) == 2
    alone = evaluate_vector(given[1], tasks[1:], "test")
    assert alone["mean"]["score"] == pytest.approx(runs[1].metrics["test"]["score"], abs=1e-6)


def test_options_are_searched_on_validation_alone(runs):
    tasks = judges([run.folder for run in runs])
    vectors = [run.vector for run in runs]
    result = evaluate_fused(vectors, tasks, "test", "ties", {"keep": [0.2, 0.5], "scaling": [0.5, 1.0]}, searched=True)
    tried = {tuple(sorted(point["options"].items())): sum(point["scores"]) for point in result["search"]}
    assert len(tried) == 4
    assert tried[tuple(sorted(result["options"].items()))] == max(tried.values())
    with pytest.raises(ValueError, match="average has no option with several values to try"):
        evaluate_fused(vectors, tasks, "test", "average", {}, searched=True)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("average", {}),
        ("dare", {"drop": 0.5}),
        ("lorahub", {"budget": 2}),
        ("adamerging", {"steps": 1}),
        ("regmean", {}),
        ("soup", {"learning_rate": 0.1}),
    ],
)
def test_every_method_finds_what_it_needs(runs, method, options):
    tasks = judges([run.folder for run in runs])
    scope = "weight" if method == "soup" else None
    vectors, _ = in_one_space([run.vector for run in runs], ["mood", "thing"], scope)
    result = evaluate_fused(vectors, tasks, "validation", method, options)
    assert 0.0 <= result["mean"]["score"] <= 1.0


def test_an_average_by_regmean_of_one_task_alone_is_its_vector(runs):
    tasks = judges([run.folder for run in runs[:1]])
    result = evaluate_fused([runs[0].vector], tasks, "test", "regmean", {})
    assert result["mean"]["score"] == pytest.approx(runs[0].metrics["test"]["score"])


def test_what_cannot_be_fused_is_refused(runs, settings, tmp_path):
    tasks = judges([run.folder for run in runs])
    vectors = [run.vector for run in runs]
    with pytest.raises(ValueError, match="unknown method 'mean'; choose one of average, task_arithmetic"):
        evaluate_fused(vectors, tasks, "test", "mean", {})
    with pytest.raises(ValueError, match="regmean needs to know which task is whose"):
        evaluate_fused(vectors, tasks, "test", "regmean", {}, own_tasks=False)
    with pytest.raises(ValueError, match="soup acts on ΔW; these vectors share a starting point"):
        evaluate_fused(vectors, tasks, "test", "soup", {})
    with pytest.raises(ValueError, match="ties takes no option 'kept'; its options are keep, scaling"):
        evaluate_fused(vectors, tasks, "test", "ties", {"kept": 0.1})
    with pytest.raises(ValueError, match="scaling"):
        evaluate_fused(vectors, tasks, "test", "task_arithmetic", {"scaling": float("nan")})
    other = train(settings("text", seed=5, out=str(tmp_path / "other"), training={"max_steps": 1}))
    with pytest.raises(linlora.DifferentPointError):
        evaluate_fused([vectors[0], other.vector], tasks, "test", "average", {})


@pytest.mark.parametrize(
    ("points", "note"),
    [
        ([({"scaling": 0.0}, [0.5, 0.7]), ({"scaling": 1.0}, [0.5, 0.7])], "every λ scores the same"),
        ([({"scaling": 0.0}, [0.7, 0.5]), ({"scaling": 1.0}, [0.5, 0.7])], "every λ scores the same"),
        ([({"scaling": 1.0, "keep": k}, [0.5, 0.7]) for k in (0.1, 0.2)], "every choice of the options scores"),
        ([({"scaling": 0.0}, [0.5, 0.7]), ({"scaling": 1.0}, [0.5, 0.8])], None),
    ],
)
def test_a_search_in_which_all_score_the_same_says_nothing(points, note):
    search = [{"options": options, "scores": scores} for options, scores in points]
    found = searched({"tasks": ["a", "b"], "references": {}, "search": search, "options": search[0]["options"]})
    assert note in str(found.caption) if note else found.caption is None
