"""The routing quickstart end to end, at a size at which nothing is learned: the files, the table, going on."""

import dataclasses
import io
import json
import shutil
import statistics

import pytest
import torch
from rich.console import Console

import linlora
from linlora.quickstart import DifferentSettingsError
from linlora.quickstart.digits import Digits
from linlora.quickstart.routing import RoutingSettings, run
from linlora.quickstart.routing.adaptation import adapt
from linlora.quickstart.routing.inventories import load_inventory
from linlora.quickstart.routing.methods import ADAPTATIONS, INVENTORIES
from linlora.quickstart.routing.results import paired_difference
from linlora.quickstart.routing.run import RoutingExperiment
from linlora.quickstart.routing.tasks import DOMAINS, QUESTIONS, divide
from linlora.quickstart.routing.workplace import accuracy

SETTINGS = RoutingSettings(
    data=Digits(
        pretraining_epochs=1, hidden_size=16, layers=1, heads=2, intermediate_size=16, tasks=("mirrored-odd",)
    ),
    domains=("rotated", "inverted"), questions=("digit", "odd", "loop"), skills=3, heads=2, rank=2, alpha=2, steps=3,
    batch=8, shots=(4, 8), adaptation_steps=2, adaptation_batch=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("routing") / "run"
    file = io.StringIO()
    results = run(out, seeds=2, settings=SETTINGS, console=Console(file=file, width=110), workers=1)
    return out, results, file.getvalue()


@pytest.fixture
def experiment(finished):
    return RoutingExperiment(SETTINGS, finished[0])


def test_every_question_and_every_domain_of_a_held_out_task_is_trained_on():
    trained, held_out = divide(list(DOMAINS), list(QUESTIONS))
    assert not set(trained) & set(held_out)
    assert {pair.domain for pair in held_out} <= {pair.domain for pair in trained}
    assert {pair.question for pair in held_out} <= {pair.question for pair in trained}


def test_a_question_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"no domain or question \['even'\]"):
        divide(["rotated"], ["odd", "even"])


def test_the_table_has_every_method_and_number_of_images(finished):
    _, results, text = finished
    assert set(results["methods"]) == set(ADAPTATIONS)
    for name, method in ADAPTATIONS.items():
        assert method.title in text
        assert set(results["methods"][name]) == {"4", "8"}


def test_the_numbers_follow_from_the_files(finished):
    out, results, _ = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    for method in ADAPTATIONS:
        means = []
        for seed in range(2):
            records = json.loads((out / "adaptations" / method / "8-shot" / f"seed{seed}" / "scores.json").read_text())
            means.append(statistics.fmean(record["test"] for record in records["tasks"]))
        assert results["methods"][method]["8"]["test"]["by_seed"] == means
        assert results["methods"][method]["8"]["test"]["mean"] == statistics.fmean(means)
    difference = paired_difference(results, "mhr-z", "lora", 8)["by_seed"]
    of = [results["methods"][name]["8"]["test"]["by_seed"] for name in ("mhr-z", "lora")]
    assert difference == [one - other for one, other in zip(*of, strict=True)]


def test_what_trains_is_what_the_method_says(finished):
    _, results, _ = finished
    layers, encoder = 6, 2 * (4 * (16 + 16) + (16 + 16) + (16 + 16))  # rank 2 on 16 x 16 layers
    parameters = {name: entry["8"]["parameters"] for name, entry in results["methods"].items()}
    assert parameters["zero"] == 0
    assert parameters["lora"] == parameters["shared"] == parameters["mhr-mu"] == encoder
    assert parameters["mhr-mu-layer"] == parameters["mhr-mu-model"] == encoder  # from B0 != 0 both factors train
    assert parameters["lora-layer"] == parameters["lora-model"] == encoder // 2
    assert parameters["poly-z"] == layers * 3
    assert parameters["mhr-z"] == parameters["mhr-z-layer"] == parameters["mhr-z-model"] == layers * 2 * 3
    assert parameters["mhr"] == 3 * encoder + layers * 2 * 3  # the logits of the trained tasks stay


def test_both_pictures_are_drawn(finished):
    out, _, _ = finished
    for name in ("accuracies.png", "routing.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_inventories_load_and_answer(finished, experiment):
    for inventory in INVENTORIES:
        model = load_inventory(experiment, inventory, 0)
        rows = experiment.rows(experiment.trained[1], "test")
        assert 0.0 <= accuracy(model, rows, task_ids=torch.ones(len(rows), dtype=torch.int64)) <= 1.0


def test_before_its_first_step_a_linearized_mean_is_the_mean(experiment):
    rows = experiment.rows(experiment.held_out[0], "train")[torch.arange(4)]
    logits = []
    for name in ("zero", "mhr-mu", "mhr-mu-layer", "mhr-mu-model"):
        model, _, _ = adapt(experiment, dataclasses.replace(ADAPTATIONS[name], learning_rate=0.0), rows, seed=0)
        logits.append(model(pixel_values=rows.images, question_ids=rows.question_ids).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0])


def test_a_label_that_a_question_does_not_have_is_never_the_answer(experiment):
    reader = experiment.reader()
    rows = experiment.rows(next(pair for pair in experiment.held_out if pair.question == "odd"), "test")
    assert reader(rows.images, rows.question_ids).logits.argmax(-1).max() <= 1


def test_an_interrupted_run_goes_on_and_gives_the_same_numbers(finished, tmp_path):
    out, results, _ = finished
    copied = shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(copied / "inventories" / "mhr" / "seed1")
    for seed in range(2):
        shutil.rmtree(copied / "adaptations" / "mhr-z" / "8-shot" / f"seed{seed}")
    again = run(copied, seeds=2, settings=SETTINGS, console=Console(file=io.StringIO()), workers=1)
    for name in ADAPTATIONS:
        for shots in ("4", "8"):
            found, before = (r["methods"][name][shots]["test"]["by_seed"] for r in (again, results))
            assert found == pytest.approx(before, abs=0.003)  # trained again, rounded otherwise


def test_a_run_that_is_started_over_has_the_backbone_of_its_own_settings(tmp_path):
    for size in (16, 8):
        data = dataclasses.replace(SETTINGS.data, hidden_size=size, pretraining_epochs=0)
        place = RoutingExperiment(dataclasses.replace(SETTINGS, data=data), tmp_path)
        for (job,) in place.prepared():
            job.function()
        assert place.reader().vit.config.hidden_size == size


def test_other_settings_are_refused(finished):
    with pytest.raises(DifferentSettingsError, match="steps: 3 and 4"):
        run(finished[0], settings=dataclasses.replace(SETTINGS, steps=4), console=Console(file=io.StringIO()))


def test_the_linearized_adapters_have_the_scope_of_their_row(experiment):
    rows = experiment.rows(experiment.held_out[0], "train")[torch.arange(4)]
    for name in ("lora-layer", "lora-model"):
        model, _, _ = adapt(experiment, ADAPTATIONS[name], rows, seed=0)
        assert linlora.TaskVector.from_model(model).scope == ADAPTATIONS[name].scope
