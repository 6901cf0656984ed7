"""What makes the comparison fair: the splits, the frozen heads, the choice of λ, and one training in two versions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression

import linlora
from linlora.quickstart import fuse, run
from linlora.quickstart.backbone import features, fit_head, moved, new_backbone
from linlora.quickstart.data import Split, load_digits
from linlora.quickstart.experiment import prepare
from linlora.quickstart.fuse import choose_scaling, fuse_one
from linlora.quickstart.report import compare
from linlora.quickstart.results import family_results, mean_std, paired_difference
from linlora.quickstart.settings import FAMILIES
from linlora.quickstart.step_time import model_of
from linlora.quickstart.tasks import TASKS, select_tasks
from linlora.quickstart.train import adapted, batches, of_family, training_steps


def test_the_splits_are_disjoint_cover_all_images_and_never_change():
    first, again = load_digits().indices, load_digits().indices
    together = torch.cat(list(first.values()))
    assert sorted(together.tolist()) == list(range(1797))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_there_are_at_least_five_tasks_in_different_domains():
    digits = load_digits()
    domains = [task.domain(digits.images) for task in TASKS]
    assert len(TASKS) >= 5
    for i, one in enumerate(domains):
        assert one.shape == digits.images.shape
        assert torch.equal(one, TASKS[i].domain(digits.images)), "a domain has to be the same every time"
        for other in [digits.images, *domains[:i]]:
            assert (one - other).abs().mean() > 0.1


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_label_of_a_task_occurs_in_every_split(task):
    for split in task.splits(load_digits()).values():
        assert set(split.labels.tolist()) == set(range(task.labels))


def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match=r"colour.*rotated-digit"):
        select_tasks(("colour",))


@pytest.mark.parametrize("labels", [2, 10])
def test_a_head_predicts_what_its_logistic_regression_predicts_and_is_frozen(miniature, labels):
    backbone = new_backbone(miniature).eval()
    digits = load_digits()
    train = Split(digits.images[:300], digits.digits[:300] % labels)
    head = fit_head(backbone, train, labels)
    with torch.no_grad():
        read = features(backbone, train.images)
        regression = LogisticRegression(C=1.0, max_iter=5000).fit(read.double().numpy(), train.labels.numpy())
        probabilities = torch.from_numpy(regression.predict_proba(read.double().numpy())).float()
        torch.testing.assert_close(head(read).softmax(dim=-1), probabilities, rtol=1e-3, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_pretraining_moves_images_a_little():
    images = load_digits().images[:200]
    change = (moved(images, torch.Generator().manual_seed(0)) - images).abs().mean()
    assert 0.1 < change < 0.5


@pytest.mark.parametrize(
    ("validation", "chosen"),
    [
        ([[0.5, 0.5], [0.7, 0.6], [0.9, 0.3]], 0.5),
        ([[0.6, 0.6], [0.7, 0.5], [0.4, 0.8]], 0.0),  # equal means: the smallest
        ([[0.1, 0.1], [0.2, 0.2], [0.9, 0.3]], 1.0),
    ],
)
def test_the_scaling_of_the_best_mean_is_chosen(validation, chosen):
    assert choose_scaling([0.0, 0.5, 1.0], validation) == chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scaling_is_chosen_on_validation_before_the_test_split_is_looked_at(
    tmp_path, miniature, monkeypatch, family
):
    """Validation scores that like 0.5 and test scores that like 1.0: 0.5 has to be chosen."""
    experiment = prepare(miniature, tmp_path, "cpu", lambda: None, lambda: None)
    vectors = []
    for seed in (0, 1):
        model = adapted(experiment.backbone, miniature, seed=0)
        start = linlora.TaskVector.from_model(model) if family == "lora" else None
        of_family(model, family)
        linlora.testing.randomize(model, seed, kinds=("lora_B",))
        vectors.append(linlora.TaskVector.from_model(model, point=start))
    full = linlora.fuse(vectors, scaling=1.0).norm()
    looked_at = []

    def synthetic_accuracies(self, model, split):
        looked_at.append(split)
        scaling = linlora.TaskVector.from_model(model, point=start).norm() / full
        best = 0.5 if split == "validation" else 1.0
        return [1 - abs(scaling - best)] * 2

    monkeypatch.setattr(type(experiment), "accuracies", synthetic_accuracies)
    monkeypatch.setattr(fuse, "load_vectors", lambda *_: vectors)
    fuse_one(experiment, family, 0)
    scores = json.loads((experiment.fused_directory(family, 0) / "scores.json").read_text())
    assert scores["chosen"] == 0.5
    assert scores["test"]["task_arithmetic"] == pytest.approx([0.5, 0.5])
    assert scores["test"]["scaling_one"] == pytest.approx([1.0, 1.0])
    assert looked_at == ["validation"] * 3 + ["test"] * 3


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_linlora_and_torch_func_are_the_same_training(miniature, scope):
    settings = replace(miniature, steps=50)
    backbone = new_backbone(settings).eval().requires_grad_(False)
    task = TASKS[0]
    train = task.splits(load_digits())["train"]
    head = fit_head(backbone, train, task.labels)
    losses = [
        torch.stack(
            list(
                training_steps(model_of(version, backbone, settings), head, train, settings, learning_rate=0.05, seed=0)
            )
        )
        for version in (scope, f"{scope}_torch_func", "lora")
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert losses[0][-5:].mean() < losses[0][:5].mean() - 0.05, "the training does train"
    assert (losses[0] - losses[2]).abs().max() > 1e-3, "and plain LoRA is another"


def test_batches_depend_on_the_seed_alone_and_use_every_image():
    one, same = (list(batches(100, 25, 8, seed=3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert sorted(torch.cat(one[:4]).tolist()) == list(range(100))
    assert not torch.equal(one[0], next(batches(100, 25, 8, seed=4)))


def test_the_normalised_score_is_the_mean_ratio_to_the_single_task_adapter():
    records = [[{"test": 0.8, "validation": 0.8}, {"test": 0.5, "validation": 0.5}]]
    scores = {"scalings": [0.0], "validation": [[0.1, 0.1]], "chosen": 0.0, "cosine": [[1.0, 0.0], [0.0, 1.0]]}
    scores["test"] = {method: [0.4, 0.5] for method in ("average", "task_arithmetic", "scaling_one")}
    results = family_results(records, [scores])
    assert results["average"]["normalised"]["mean"] == pytest.approx((0.4 / 0.8 + 0.5 / 0.5) / 2)
    assert results["average"]["absolute"]["mean"] == pytest.approx(0.45)
    assert results["single"] == {"mean": pytest.approx(0.65), "std": None, "by_seed": [pytest.approx(0.65)]}


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


def test_families_are_compared_seed_by_seed():
    families = {
        "model": {"average": {"absolute": mean_std([0.5, 0.9])}},
        "lora": {"average": {"absolute": mean_std([0.4, 0.8])}},
    }
    difference = paired_difference({"families": families}, ("model", "lora"), "average", "absolute")
    assert difference["by_seed"] == pytest.approx([0.1, 0.1])
    assert difference["std"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"seeds": 0}, "seeds has to be 1 or more"),
        ({"processes": 0}, "processes has to be 1 or more"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, miniature, console, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", settings=miniature, console=console, **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_with_a_remedy(tmp_path, miniature, console):
    with pytest.raises(ValueError, match=r"'cuda' is not available.*--device cpu"):
        run(tmp_path / "run", device="cuda", settings=miniature, console=console)
    assert not (tmp_path / "run").exists()
