"""What is chosen on validation, what forgetting keeps, and how scores become a table; worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linlora import TaskVector
from linlora.experiments import Options, fusing, judges
from linlora.experiments.controls import Space
from linlora.experiments.evaluation import evaluate_fused
from linlora.experiments.fusing import forgetting, fuse_by
from linlora.experiments.image_suite import ImageSuite, Split
from linlora.experiments.judges import Judge
from linlora.experiments.options import learning_rates
from linlora.experiments.report import compare
from linlora.experiments.results import control_results, mean_std, normalised, paired
from linlora.training import Settings


def vector(*values):
    return TaskVector({"q.dB": torch.tensor(values)}, None, "", {"q": 1.0}, "layer")


class Line:
    """Two tasks whose scores are functions of the one vector in the model: 1 − |value − best| of each element."""

    names = ("first", "second")
    trained_modules = ()

    def __init__(self, best):
        self.best = best
        self.tested = []

    def scores(self, model, split):
        if split == "test":
            self.tested.append(model.value)
        return [1 - abs(v - b) for v, b in zip(model.value, self.best[split], strict=True)]

    def labeled(self, size, limit):
        return [[name] for name in self.names]

    def loss(self, model, batch):
        return -self.scores(model, "validation")[self.names.index(batch)]


def at(vectors):
    model = nn.Module()
    model.value = None

    def put(fused):
        model.value = fused.deltas["q.dB"].tolist()

    return Space(vectors, lambda: model, model, put)


def test_options_are_chosen_on_validation_and_test_is_looked_at_once():
    tasks = Line({"validation": (0.5, 0.5), "test": (1.0, 1.0)})
    space = at([vector(1.0, 0.0), vector(0.0, 1.0)])
    options = Options(scalings=(0.0, 0.5, 1.0))
    found, _ = fuse_by("task_arithmetic", space, tasks, options, seed=0)
    assert found["options"] == {"scaling": 0.5}
    assert [point["scores"] for point in found["validation"]] == [[0.5, 0.5], [1.0, 1.0], [0.5, 0.5]]
    assert found["test"] == [0.5, 0.5]
    assert tasks.tested == [[0.5, 0.5]]


def test_regmean_sees_as_many_rows_as_its_option_says(monkeypatch):
    def rows(model, batches, layers, logits):
        return sum(len(batch["inputs"]["pixel_values"]) for batch in batches)

    monkeypatch.setattr(fusing, "input_moments", rows)
    split = Split(torch.zeros(200, 1, 2, 2), torch.zeros(200, dtype=torch.int64))
    suite = ImageSuite(nn.Identity(), {"task": {"validation": split}}, {})
    for examples, seen in ((5, 5), (64, 64), (100, 100), (999, 200)):
        found = fusing.data_for("regmean", at([vector(1.0)]), suite, Options(regmean_examples=examples))
        assert found["inputs"] == [seen]
        labels = [len(batch["labels"]) for batch in suite.labeled(16, examples)[0]]
        assert sum(labels) == seen
        assert max(labels) <= 16


@pytest.mark.parametrize("test", [None, "test"], ids=["found", "named"])
def test_options_are_not_searched_on_the_rows_of_the_test(monkeypatch, test):
    monkeypatch.setattr(judges, "has_test", lambda data: True)
    data = {"path": "rows", "validation": "test", "test": test, "text": "text"}
    task = Judge(Settings.from_dict({"model": "bert", "kind": "classification", "data": data, "name": "mood"}))
    with pytest.raises(ValueError, match="'mood': validation and test are both 'test'"):
        evaluate_fused([vector(1.0), vector(2.0)], [task], "test", "task_arithmetic", {}, searched=True)


def test_lorahub_minimises_the_loss_of_the_fused_model():
    tasks = Line({"validation": (0.5, -0.5), "test": (0.5, -0.5)})
    space = at([vector(1.0, 0.0), vector(0.0, 1.0)])
    found, _ = fuse_by("lorahub", space, tasks, Options(lorahub_budget=40), seed=0)
    assert sum(found["test"]) > 1.7  # without it 1.0


def test_forgetting_takes_the_largest_scaling_that_keeps_the_others():
    """Negating the first vector by λ takes λ from the first task and 0.1 λ from the second."""
    tasks = Line({"validation": (0.0, 0.0), "test": (0.0, 0.0)})
    space = at([vector(1.0, 0.1), vector(0.2, 1.0)])
    before = {"validation": [1.0, 1.0], "test": [1.0, 1.0]}
    found = forgetting(space, tasks, Options(negation_scalings=(0.1, 0.25, 0.5, 1.0), negation_keeps=0.949), before)
    assert found["scaling"] == [0.5, 0.25]  # 1 - 0.1 · 0.5 = 0.95; 1 - 0.2 · 0.25 = 0.95
    assert found["forgotten"] == pytest.approx([0.5, 0.75])
    assert found["others"] == pytest.approx([0.95, 0.95])


def test_forgetting_that_costs_the_others_too_much_is_not_done():
    tasks = Line({"validation": (0.0, 0.0), "test": (0.0, 0.0)})
    space = at([vector(1.0, 1.0), vector(0.0, 1.0)])
    before = {"validation": [1.0, 1.0], "test": [0.9, 0.8]}
    found = forgetting(space, tasks, Options(negation_scalings=(0.5,)), before)
    assert found["scaling"] == [0.0, 0.5]
    assert found["forgotten"][0] == 0.9


def scores_of(*fused):
    return [
        {
            "before": [0.5, 0.5],
            "methods": {"average": {"options": {}, "validation": [], "test": test}},
            "negation": {"scaling": [1.0, 1.0], "forgotten": [0.1, 0.3], "others": [0.4, 0.6]},
            "cosine": [[1.0, 0.1 * (seed + 1)], [0.1 * (seed + 1), 1.0]],
        }
        for seed, test in enumerate(fused)
    ]


def records(*single):
    return [[{"validation": None, "test": score} for score in of_seed] for of_seed in single]


def test_scores_are_averaged_over_tasks_then_over_seeds():
    found = control_results(records((0.8, 1.0), (0.8, 0.8)), scores_of([0.4, 1.0], [0.8, 0.4]))
    assert found["single"]["by_seed"] == pytest.approx([0.9, 0.8])
    average = found["methods"]["average"]
    assert average["absolute"]["by_seed"] == pytest.approx([0.7, 0.6])
    assert average["normalised"]["by_seed"] == pytest.approx([0.75, 0.75])
    assert average["normalised"]["std"] == pytest.approx(0.0)
    assert found["negation"]["forgotten"]["mean"] == pytest.approx(0.2)
    assert found["cosine"][0][1] == pytest.approx(0.15)


def test_a_single_score_that_is_not_above_zero_leaves_the_normalised_score_open():
    assert normalised([0.5, 0.5], [0.0, 1.0]) is normalised([0.5, 0.5], [-0.1, 1.0]) is None  # correlations go below 0
    controls = {
        "factors": control_results(records((0.0, 1.0)), scores_of([0.5, 0.5])),
        "layer": control_results(records((1.0, 1.0)), scores_of([0.5, 0.5])),
    }
    assert paired({"controls": controls}, "layer", "factors", "average")["mean"] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Options(("slerp",)), "choose from average, task_arithmetic.*got slerp"),
        (lambda: Options.of_values({"ties_keep": "often"}, "--set"), r"--set ties_keep: expected numbers.*'often'"),
        (lambda: Options.of_values({"lorahub_budget": [1, 2]}, "--set"), "expected a number"),
        (lambda: Options.of_values({"lorahub_budget": 2.5}, "--set"), r"lorahub_budget: expected a whole number.*2\.5"),
        (lambda: Options(soup_examples=0), "soup_examples has to be 1 or more"),
        (lambda: Options(scalings=()), "scalings: there has to be a value"),
        (lambda: learning_rates(["model"]), "METHOD=RATE"),
    ],
)
def test_options_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.02, 0.03, 0.04], "this is better than that by 3.0 ± 1.0 points"),
        ([-0.02, -0.03, -0.04], "this is worse than that by 3.0 ± 1.0 points"),
        ([-0.02, 0.03, 0.01], "this and that do not clearly differ (+0.7 ± 2.5 points)"),
        ([-0.02], "this is worse than that by 2.0 points (one seed)"),
        ([0.0], "this and that are equal (one seed)"),
    ],
)
def test_the_reading_says_better_worse_or_neither(differences, verdict):
    assert compare("this", "that", mean_std(differences)) == verdict
