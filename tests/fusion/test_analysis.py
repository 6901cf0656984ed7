"""Cosines and disentanglement errors, as numbers and as pictures."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import linlora
from linlora.fusion import Disentanglement, cosines, disentanglement, predictor
from linlora.fusion.figures import draw_cosines, draw_disentanglement
from linlora.testing import tiny_batch


def test_cosines(vectors, flat):
    rows = torch.stack([flat(vector) for vector in vectors]).numpy()
    np.testing.assert_allclose(cosines(vectors), np.corrcoef(rows - 0.0), atol=5e-2)  # noise: means near 0
    norms = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(cosines(vectors), rows @ rows.T / np.outer(norms, norms), rtol=1e-12)


def test_cosines_beside_a_zero_vector(made):
    assert cosines(made([0.0, 0.0], [1.0, 0.0], [-2.0, 0.0])).tolist() == [[0, 0, 0], [0, 1, -1], [0, -1, 1]]


def test_vectors_on_different_layers_are_disentangled(made):
    """Each task reads one value of the vector, so the other vector is never seen."""
    first, second = made([2.0, 0.0], [0.0, -3.0])

    def predict(vector, task):
        return (vector.deltas["q.dB"][task] * torch.linspace(-1, 1, 9)).sign().long()

    found = disentanglement(first, second, predict, [-1.0, 0.0, 0.5, 1.0])
    assert found.error.shape == (4, 4)
    assert not found.error.any()


def test_the_error_by_hand(made):
    """Both tasks see the sum: class λ1 + λ2 > 0 against λ1 > 0 (task 0) and λ2 > 0 (task 1), on one input."""
    first, second = made([1.0], [1.0])
    found = disentanglement(first, second, lambda vector, task: (vector.deltas["q.dB"] > 0).long(), [-2.0, 0.0, 1.0])
    assert found.rates[0].tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0]]  # rows λ1, columns λ2
    assert found.rates[1].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert found.error.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    assert found.scalings.tolist() == [-2.0, 0.0, 1.0]


def test_the_error_of_models(vectors, at, scope):
    """Against the definition, evaluated point by point; a vector alone is the model of its task."""
    model = at(scope).train()
    inputs = [[tiny_batch("bert", rows=8, seed=1), tiny_batch("bert", rows=5, seed=2)], [tiny_batch("bert", rows=9)]]
    first, second, _ = vectors
    scalings = [-1.0, 0.0, 1.0]
    found = disentanglement(first, second, predictor(model, inputs), scalings)
    assert model.training
    model.eval()

    def classes(vector, task):
        linlora.apply(model, vector)
        with torch.no_grad():
            return torch.cat([model(**batch).logits for batch in inputs[task]]).argmax(1)

    for i, a in enumerate(scalings):
        for j, b in enumerate(scalings):
            fused = a * first + b * second
            for task, alone in enumerate((a * first, b * second)):
                rate = (classes(fused, task) != classes(alone, task)).double().mean()
                assert found.rates[task, i, j] == pytest.approx(float(rate))
    assert not found.rates[0, :, 1].any()  # λ2 = 0
    assert not found.rates[1, 1, :].any()  # λ1 = 0
    assert 0.0 < found.error.max() <= 2.0


def test_bad_grids(made):
    first, second = made([1.0], [1.0])
    with pytest.raises(ValueError, match="the grid of scalings is empty"):
        disentanglement(first, second, None, [])
    with pytest.raises(ValueError, match="scalings has to be finite"):
        disentanglement(first, second, None, [0.0, float("inf")])


def drawn(path):
    """The picture, and that it was left alone in its folder."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    picture = imread(path)
    assert picture.shape[0] > 200
    assert picture.shape[1] > 200
    return picture


def test_the_picture_of_cosines(tmp_path):
    matrix = np.array([[1.0, 0.4, -0.2], [0.4, 1.0, 0.0], [-0.2, 0.0, 1.0]])
    draw_cosines(matrix, ["one", "two", "three"], tmp_path / "cosines.png")
    assert np.unique(drawn(tmp_path / "cosines.png").reshape(-1, 4), axis=0).shape[0] > 50
    draw_cosines(np.ones((1, 1)), ["one"], tmp_path / "cosines.png")
    with pytest.raises(ValueError, match=r"a matrix of shape \(3, 3\) for 2 names"):
        draw_cosines(matrix, ["one", "two"], tmp_path / "none.png")
    drawn(tmp_path / "cosines.png")


def test_the_picture_of_the_error_does_not_depend_on_the_order_of_the_grid(tmp_path):
    scalings, rates = np.array([0.0, 1.0, 0.5]), np.random.default_rng(0).random((2, 3, 3))
    order = np.argsort(scalings)
    pictures = []
    for found in (
        Disentanglement(scalings, rates),
        Disentanglement(scalings[order], rates[:, order][:, :, order]),
    ):
        draw_disentanglement(found, ["one", "two"], tmp_path / "map.png")
        pictures.append(drawn(tmp_path / "map.png"))
    np.testing.assert_array_equal(*pictures)
