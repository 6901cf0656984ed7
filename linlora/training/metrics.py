"""The scores of predictions, as fractions: larger is better for all.

    classes      accuracy, f1 (of class 1 where there are two, the mean over classes elsewhere), matthews
    numbers      pearson, spearman
    free text    exact_match (case, white space and punctuation aside)

A score that is undefined, a correlation with predictions that are all alike, is 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from linlora.training.answers import normalized

# By kind of answer; a run is judged by the first unless `metric` says otherwise.
METRICS = {
    "classes": ("accuracy", "f1", "matthews"),
    "numbers": ("spearman", "pearson"),
    "text": ("exact_match",),
}


def check_metric(metric: str, answer: str) -> None:
    if metric not in METRICS[answer]:
        raise ValueError(f"metric '{metric}' is not one of {answer}; choose one of {', '.join(METRICS[answer])}")


def class_scores(predicted: Sequence[int], expected: Sequence[int], classes: int) -> dict[str, float]:
    """Scores of class indices. A prediction that is no class (-1, an answer that is none of them) is wrong.

    >>> class_scores([0, 1, 1, -1], [0, 1, 0, 1], classes=2)
    {'accuracy': 0.5, 'f1': 0.5, 'matthews': 0.22360679774997896}
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    y, p = np.asarray(expected), np.asarray(predicted)
    of = {"labels": [1]} if classes == 2 else {"labels": range(classes)}
    return {
        "accuracy": float((y == p).mean()),
        "f1": float(f1_score(y, p, average="macro", zero_division=0.0, **of)),
        "matthews": _defined(lambda: matthews_corrcoef(y, p)),
    }


def number_scores(predicted: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    """Correlations.

    >>> number_scores([1.0, 2.0, 9.0], [0.0, 1.0, 2.0])["spearman"]
    1.0
    """
    from scipy.stats import pearsonr, spearmanr

    return {
        "spearman": _defined(lambda: spearmanr(predicted, expected).statistic),
        "pearson": _defined(lambda: pearsonr(predicted, expected).statistic),
    }


def text_scores(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """
    >>> text_scores([" Paris.", "Rome"], ["paris", "Oslo"])
    {'exact_match': 0.5}
    """
    pairs = zip(predicted, expected, strict=True)
    return {"exact_match": float(np.mean([normalized(p) == normalized(y) for p, y in pairs]))}


def _defined(statistic: Callable[[], float]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant predictions
        try:
            value = float(statistic())
        except ValueError:  # fewer than two rows
            value = math.nan
    return 0.0 if math.isnan(value) else value
