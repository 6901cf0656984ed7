"""What a text answers, and what answers score."""

import numpy as np
import pytest

from linlora.training.answers import UNANSWERED, match, number
from linlora.training.metrics import check_metric, class_scores, number_scores, text_scores

ENTAILMENT = ["entailment", "not entailment"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("entailment", 0), ("Entailment", 0), (" ENTAILMENT. ", 0), ("entailment, because it says so", 0),
        ("not entailment", 1), ("Not  Entailment!", 1), ('"not entailment"', 1), ("(entailment)", 0),
        ("", UNANSWERED), ("maybe entailment", UNANSWERED), ("entailments", UNANSWERED), ("not", UNANSWERED),
        ("not\nentailment", 1), ("<b>entailment", UNANSWERED),
    ],
)  # fmt: skip
def test_an_answer_is_what_the_text_begins_with(text, answer):
    assert match(text, ENTAILMENT) == answer
    assert match(text, ENTAILMENT[::-1]) == (answer if answer < 0 else 1 - answer)  # whatever their order


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3.8", 3.8), (" 5.0.", 5.0), ("about 2 of 5", 2.0), ("-1", -1.0), (".5", 0.5), ("3,5", 3.5), ("none", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_number_is_the_first_in_the_text(text, value):
    assert number(text) == value


def test_scores_of_classes_by_hand():
    scores = class_scores([1, 1, 0, 0], [1, 0, 0, 0], classes=2)
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx(2 / 3)  # of class 1: precision 1/2, recall 1
    assert scores["matthews"] == pytest.approx((1 * 2 - 1 * 0) / np.sqrt(2 * 1 * 3 * 2))
    three = class_scores([0, 1, 2, 2], [0, 1, 2, 1], classes=3)
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_what_is_unanswered_is_wrong():
    assert class_scores([-1, -1], [0, 1], classes=2) == {"accuracy": 0.0, "f1": 0.0, "matthews": 0.0}


def test_correlations_and_what_they_are_of_constants():
    scores = number_scores([0.0, 1.0, 4.0], [0.0, 1.0, 2.0])
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(np.corrcoef([0, 1, 4], [0, 1, 2])[0, 1])
    assert number_scores([1.0, 1.0], [0.0, 1.0]) == {"spearman": 0.0, "pearson": 0.0}
    assert number_scores([1.0], [1.0]) == {"spearman": 0.0, "pearson": 0.0}


def test_free_text_matches_exactly_but_for_case_and_punctuation():
    assert text_scores(["The cat.", "dog"], ["the cat", "dogs"]) == {"exact_match": 0.5}


def test_a_metric_of_another_kind_of_answer_is_refused():
    with pytest.raises(ValueError, match="'spearman' is not one of classes; choose one of accuracy, f1, matthews"):
        check_metric("spearman", "classes")
