"""The search for options."""

import functools

import numpy as np
import pytest
import torch

import linlora
from linlora.fusion import grid, search


def test_the_best_options_and_the_whole_curve(made):
    vectors = made([1.0, 2.0], [3.0, -1.0])
    goal = linlora.fuse(vectors, "ties", keep=1.0, scaling=0.5)
    found = search(
        functools.partial(linlora.fuse, vectors, "ties"),
        lambda fused: -(fused - goal).norm(),
        grid(keep=[0.5, 1.0], scaling=[0.25, 0.5, 1.0]),
    )
    assert found.options == {"keep": 1.0, "scaling": 0.5}
    assert found.score == 0.0
    assert [tuple(point.options.values()) for point in found.curve] == [
        (0.5, 0.25), (0.5, 0.5), (0.5, 1.0), (1.0, 0.25), (1.0, 0.5), (1.0, 1.0)
    ]  # fmt: skip
    assert found.curve[5].mean == pytest.approx(-0.5 * linlora.fuse(vectors, "ties", keep=1.0).norm())


def scored(table):
    """A search whose fused vector is its λ, over a table of scores by λ."""
    return search(lambda scaling: scaling, table.get, grid(scaling=list(table)))


def test_several_tasks_are_averaged_and_kept():
    found = scored({0.0: [0.2, 0.2], 0.5: [0.9, 0.5], 1.0: [0.8, 0.5]})
    assert found.options == {"scaling": 0.5}
    assert found.score == pytest.approx(0.7)
    assert [point.scores for point in found.curve] == [(0.2, 0.2), (0.9, 0.5), (0.8, 0.5)]


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_scores_may_be_an_array(array):
    found = scored({0.0: array([0.25, 0.5]), 0.5: array(0.5)})
    assert [point.scores for point in found.curve] == [(0.25, 0.5), (0.5,)]


def test_of_equal_scores_the_first_tried_wins():
    assert scored({0.1: [0.1, 0.2], 0.2: [0.2, 0.1], 0.3: 0.15 + 1e-14}).options == {"scaling": 0.1}


def test_nan_is_never_the_best():
    found = scored({0.1: float("nan"), 0.2: -3.0})
    assert found.options == {"scaling": 0.2}
    assert len(found.curve) == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [({}, "no options to try"), ({1.0: float("nan")}, "all 1 scores are NaN"), ({1.0: []}, "holds no number")],
)
def test_refusals(table, message):
    with pytest.raises(ValueError, match=message):
        scored(table)


def test_the_bar_is_shown_on_a_terminal_alone(monkeypatch, capsys):
    scored({0.1: 1.0, 0.2: 2.0})
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    scored({0.1: 1.0, 0.2: 2.0})
    assert "searching" in capsys.readouterr().err
    search(lambda scaling: scaling, float, grid(scaling=[1.0]), progress=False)
    assert capsys.readouterr().err == ""
