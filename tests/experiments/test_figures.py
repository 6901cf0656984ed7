"""The figures say what the numbers say, also where scores are negative, missing, or of a grid of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from linlora.experiments import figures


@pytest.fixture
def drawn(monkeypatch):
    """Every figure, in place of its file."""
    found = []
    monkeypatch.setattr(figures, "save", lambda figure, path: found.append(figure))
    return found


def results(method, **of_method):
    controls = {key: {"methods": {method: of_method}} for key in ("factors", "layer")}
    return {"starts": {"zero": {"title": "B0 = 0", "controls": controls}}, "tasks": ["one", "two"], "seeds": 1}


def curve(*means_by_scaling):
    return [{"options": {"scaling": s}, "mean": mean, "std": None} for s, mean in means_by_scaling]


def test_a_search_is_drawn_at_its_best_score_of_each_scaling_below_zero_too(drawn):
    points = [{"options": {"scaling": s, "keep": k}, "scores": [-k, -0.4]} for s in (0.5, 1.0) for k in (0.2, 0.6)]
    assert figures.draw_search({"TIES": points}, {"backbone": 0.1}, "title", Path("picture.png"))
    line = drawn[0].axes[0].lines[0]
    assert list(line.get_xdata()) == [0.5, 1.0]
    assert list(line.get_ydata()) == pytest.approx([-30.0, -30.0])


def test_scalings_are_drawn_in_their_order_with_the_backbone_where_it_was_scored(drawn):
    for points, backbone in ((curve((1.0, 0.7), (0.5, 0.8)), []), (curve((1.0, 0.7), (0.0, 0.3)), [30.0])):
        figures.draw_scalings(results("task_arithmetic", validation=points), Path("picture.png"))
        (axes,) = drawn.pop().axes
        assert list(axes.lines[0].get_xdata()) == sorted(point["options"]["scaling"] for point in points)
        flat = [line.get_ydata()[0] for line in axes.lines if "backbone" in str(line.get_label())]
        assert flat == pytest.approx(backbone)
        assert axes.get_title() == "Validation score at λ = 1: LoRA factors 70 %, LoRA factors 70 %"


@pytest.mark.parametrize(("mean", "title"), [(None, "fused /"), (-0.1, "kept with LoRA factors by average: -10 %")])
def test_the_title_of_the_scores_claims_no_more_than_there_is(drawn, mean, title):
    figures.draw_scores(results("average", normalised={"mean": mean, "std": None}), Path("picture.png"))
    assert title in drawn[0].get_suptitle()
    assert ("Most of" in drawn[0].get_suptitle()) == (mean is not None)
