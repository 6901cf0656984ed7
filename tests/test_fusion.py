"""Fusion methods against their formulas, and fused models against the sum of what the vectors do."""

import pytest
import torch

import linlora
from linlora import TaskVector
from linlora.testing import randomize, tiny_model


@pytest.fixture
def vectors():
    result = []
    for seed in (1, 2, 3):
        model = tiny_model("bert", trained=True)
        linlora.linearize(model)
        randomize(model, seed, ("lora_dA", "lora_dB"))
        result.append(TaskVector.from_model(model))
    return result


def deltas_equal(vector, expected):
    assert vector.deltas.keys() == expected.keys()
    return all(torch.allclose(vector.deltas[name], expected[name], atol=1e-6) for name in expected)


def test_average(vectors):
    a, b, c = (v.deltas for v in vectors)
    assert deltas_equal(linlora.fuse(vectors, "average"), {n: (a[n] + b[n] + c[n]) / 3 for n in a})


def test_task_arithmetic_with_one_scaling_and_with_one_each(vectors):
    a, b, c = (v.deltas for v in vectors)
    assert deltas_equal(linlora.fuse(vectors), {n: 0.3 * (a[n] + b[n] + c[n]) for n in a})
    assert deltas_equal(linlora.fuse(vectors, scaling=[1, -2, 0.5]), {n: a[n] - 2 * b[n] + 0.5 * c[n] for n in a})


def test_fused_delta_weight_is_the_sum_of_the_delta_weights(vectors):
    """What layer scope is for: no cross terms. For plain LoRA factors the same sum is off by B_i A_j."""
    model = tiny_model("bert", trained=True)
    linlora.linearize(model)
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    start = layer.get_delta_weight("default")
    changes = []
    for vector in (*vectors, linlora.fuse(vectors, scaling=1.0)):
        linlora.apply(model, vector)
        changes.append(layer.get_delta_weight("default") - start)
    torch.testing.assert_close(changes[3], changes[0] + changes[1] + changes[2], rtol=1e-4, atol=1e-6)


def test_one_vector_fuses_to_itself(vectors):
    assert deltas_equal(linlora.fuse(vectors[:1], "average"), vectors[0].deltas)


def test_refusals(vectors):
    with pytest.raises(ValueError, match="no vectors"):
        linlora.fuse([])
    with pytest.raises(ValueError, match="unknown method 'magic'; choose one of average, task_arithmetic"):
        linlora.fuse(vectors, "magic")
    with pytest.raises(ValueError, match="2 scalings for 3 vectors"):
        linlora.fuse(vectors, scaling=[1, 2])
    with pytest.raises(ValueError, match="has to be finite"):
        linlora.fuse(vectors, scaling=float("nan"))
