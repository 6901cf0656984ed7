"""The digits: their splits, tasks, frozen heads and pre-training."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from linlora.experiments.descent import batches
from linlora.experiments.image_suite import Split, features
from linlora.quickstart.digits import Digits
from linlora.quickstart.digits import backbone as module
from linlora.quickstart.digits.backbone import fit_head, moved, new_backbone, pretrain
from linlora.quickstart.digits.data import load_digits
from linlora.quickstart.digits.tasks import TASKS, select_tasks

MINIATURE = Digits(hidden_size=16, layers=1, heads=2, intermediate_size=16, pretraining_epochs=3)


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
def test_a_head_predicts_what_its_logistic_regression_predicts_and_is_frozen(labels):
    backbone = new_backbone(MINIATURE).eval()
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


def test_batches_depend_on_the_seed_alone_and_use_every_image():
    one, same = (list(batches(100, 25, 8, seed=3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert sorted(torch.cat(one[:4]).tolist()) == list(range(100))
    assert not torch.equal(one[0], next(batches(100, 25, 8, seed=4)))


def test_interrupted_pretraining_ends_as_the_uninterrupted_one(tmp_path, monkeypatch):
    digits = load_digits()
    train = digits.split(digits.images, digits.digits)["train"].first(200)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = pretrain(MINIATURE, train, tmp_path / "whole", "cpu")

    def interrupted(images, generator):
        if (tmp_path / "parts" / module.PARTIAL_FILE).exists():
            raise KeyboardInterrupt
        return moved(images, generator)

    with monkeypatch.context() as patch:
        patch.setattr(module, "moved", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(MINIATURE, train, tmp_path / "parts", "cpu")
    parts = pretrain(MINIATURE, train, tmp_path / "parts", "cpu")
    images = digits.images[:20]
    torch.testing.assert_close(features(parts, images), features(whole, images))
    untrained = new_backbone(MINIATURE).eval()
    assert not torch.allclose(features(parts, images), features(untrained, images), atol=1e-2)
