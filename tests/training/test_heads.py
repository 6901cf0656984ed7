"""Heads of prototypes, and where the function ends that is linearized at model scope."""

import peft
import pytest
import torch
import transformers

import linlora
from linlora.storage.tensor_files import load_tensors
from linlora.testing import randomize, relative_error
from linlora.training import Data, Run, Suite, adapt, evaluate, load_task, train

KINDS = ("text", "image", "zero-shot")


@pytest.fixture
def task(settings, checkpoints):
    """A task with prototypes."""

    def make(kind="text", **changes):
        if kind != "zero-shot":
            changes = {"head": "prototypes", **changes}
        if kind == "text":
            changes = {"model": checkpoints["encoder"], **changes}
        return load_task(settings(kind, **changes))

    return make


def batch(task, rows=5):
    return task.inputs([task.rows("test")[i] for i in range(rows)])


def test_prototypes_are_the_centred_means_of_the_features_before_training(task, checkpoints):
    found = task("text")
    encoder = transformers.AutoModel.from_pretrained(checkpoints["encoder"]).eval()

    @torch.no_grad()
    def features(row):
        return encoder(**found.tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0].mean(0)

    means = torch.stack(
        [torch.stack([features(row) for row in found.rows("train") if row["label"] == k]).mean(0) for k in (0, 1)]
    )
    centre = means.mean(0)
    torch.testing.assert_close(found.head.centre, centre)
    expected = 16 * torch.nn.functional.normalize(means - centre, dim=-1)
    torch.testing.assert_close(found.head.prototypes, expected)
    rows = [found.rows("test")[i] for i in range(4)]
    scores = torch.stack([torch.nn.functional.normalize(features(row) - centre, dim=-1) for row in rows]) @ expected.T
    with torch.no_grad():
        torch.testing.assert_close(found.logits(found.base_model(), found.inputs(rows)), scores)
        torch.testing.assert_close(found.logits(encoder, found.inputs(rows)), scores)  # as transformers has it


def test_prototypes_are_made_of_the_split_that_is_named(task, review_files):
    data = Data(review_files, text=("text",), prototypes="validation")
    other = Data(review_files, train="validation", validation="test", text=("text",))
    torch.testing.assert_close(task(data=data).head.prototypes, task(data=other).head.prototypes)


def test_prototypes_of_the_train_split_know_no_row_that_is_held_out_of_it(task, review_files):
    first, named = (Data(review_files, text=("text",), validation=0.5, prototypes=split) for split in (None, "train"))
    assert len(task(data=named).rows("prototypes")) == 24
    assert torch.equal(task(data=named).head.prototypes, task(data=first).head.prototypes)


@pytest.mark.parametrize("end", ["scores", "features"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_function_is_linear_up_to_there(task, kind, end):
    """Against central differences of the plain model in float64."""
    found = task(kind, linear_to=end)
    linear = adapt(found, method="model").model.eval()
    randomize(linear, 1, ("lora_B",))
    vector = linlora.TaskVector.from_model(linear)
    plain = adapt(found, vector, method="lora").model.eval().double()
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in batch(found).items()}

    def at(step):
        for name, parameter in linlora.vectors.adapters.delta_parameters(plain).items():
            if name.endswith(".dB"):
                parameter.data = step * vector.deltas[name].double()
        outputs = plain(**inputs).logits
        return outputs if end == "scores" else outputs.double()

    with torch.no_grad():
        found.enter(plain)
        tangent = (at(1e-3) - at(-1e-3)) / 2e-3
        expected = at(0.0) + tangent
        if end == "features":
            expected = found.head.scores(expected)
        assert relative_error(found.logits(linear, batch(found)), expected) < 1e-4
        assert (
            relative_error(expected, found.logits(plain, inputs)) > 1e-4
        )  # it is another function than the scores there


@pytest.mark.parametrize("kind", KINDS)
def test_no_function_is_without_a_rule(task, kind):
    found = task(kind)
    made = adapt(found, method="model")
    found.logits(made.model, batch(found)).sum().backward()
    assert [f.function for f in made.report.fallbacks] == []


@pytest.mark.parametrize("kind", KINDS)
def test_at_layer_scope_the_end_makes_no_difference(task, kind):
    scores, features = (task(kind, linear_to=end) for end in ("scores", "features"))
    model = adapt(scores, method="layer").model.eval()
    randomize(model, 1, ("lora_B",))
    other = adapt(features, method="layer").model.eval()
    linlora.apply(other, linlora.TaskVector.from_model(model))
    with torch.no_grad():
        torch.testing.assert_close(
            scores.logits(model, batch(scores)), features.logits(other, batch(features)), rtol=1e-5, atol=1e-5
        )


def test_a_run_with_prototypes_is_an_adapter_of_the_encoder(task, checkpoints):
    found = task("text")
    run = train(found.settings)
    assert run.head is None
    assert evaluate(run.model(found), found, "test") == run.metrics["test"]
    stock = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(checkpoints["encoder"]), run.folder)
    held, metadata = load_tensors(run.folder / "prototypes.safetensors")
    assert metadata["classes"] == '["0", "1"]'
    hidden = stock.eval()(**batch(found, 1)).last_hidden_state[0].mean(0)
    scores = torch.nn.functional.normalize(hidden - held["centre"], dim=-1) @ held["prototypes"].T
    torch.testing.assert_close(scores, found.logits(run.model(found), batch(found, 1))[0])


def test_a_suite_of_prototypes_scores_each_task_by_its_own(task, review_files, tmp_path):
    things = Data(review_files, text=("text",), label="thing")
    tasks = {
        "mood": task("text", name="mood", out=str(tmp_path / "mood")),
        "thing": task("text", name="thing", out=str(tmp_path / "thing"), data=things),
    }
    runs = [train(found.settings) for found in tasks.values()]
    suite = Suite(tasks, runs[0].vector, {})
    for run in runs:
        suite.put(run.vector)
        assert suite.evaluate(suite.model, "test")[run.settings.name] == run.metrics["test"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "trained", "linear_to": "scores"}, "the scores are not where the function of a trained head ends"),
        ({"head": "frozen", "linear_to": "features"}, "the features are not where the function of a frozen head ends"),
        ({"linear_to": "logits"}, "linear_to is one of scores, features, got 'logits'"),
        ({"model": "t5"}, "is a t5; head: prototypes takes an encoder"),
    ],
)
def test_ends_and_models_that_do_not_go_together_are_refused(task, checkpoints, changes, message):
    changes = {key: checkpoints.get(value, value) for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        task("text", **changes)


def test_runs_of_zero_shot_from_before_the_choice_ended_at_the_features(settings):
    run = train(settings("zero-shot", method="model"))
    path = run.folder / "settings.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("linear_to")))
    assert Run.open(run.folder).settings.ends_at == "features"
    assert run.settings.ends_at == "scores"
