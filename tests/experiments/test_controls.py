"""What each control adds, against matrices worked by hand and against the models that were trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import linlora
from linlora import TaskVector
from linlora.experiments import delta_weight
from linlora.experiments.controls import BY_KEY, CONTROLS, cosine_matrix, space
from linlora.testing import randomize, tiny_base, tiny_batch, tiny_model
from linlora.training.adapted import freeze_A, model_for

STARTS = ("zero", "warm")


def plain(dA, dB, A0=((1.0, 0.0),), B0=((0.0,), (0.0,)), scaling=0.5):
    deltas = {"q.dA": torch.tensor(dA), "q.dB": torch.tensor(dB)}
    return TaskVector(deltas, {"q.A0": torch.tensor(A0), "q.B0": torch.tensor(B0)}, "", {"q": scaling}, "lora")


# A1 = [1 1], B1 = [2 0]ᵀ; A2 = [3 0], B2 = [0 4]ᵀ
ONE, TWO = plain([[0.0, 1.0]], [[2.0], [0.0]]), plain([[2.0, 0.0]], [[0.0], [4.0]])


def matrix(update):
    return update.B @ update.A


def test_delta_weights_worked_by_hand():
    first, second = delta_weight.dense([ONE, TWO])
    assert first.deltas["q.dW"].tolist() == [[1.0, 1.0], [0.0, 0.0]]  # 0.5 [2 0]ᵀ [1 1]
    assert second.deltas["q.dW"].tolist() == [[0.0, 0.0], [6.0, 0.0]]  # 0.5 [0 4]ᵀ [3 0]


def test_factors_that_are_added_bring_cross_terms_and_stacked_ones_do_not():
    by_factors = matrix(delta_weight.change(linlora.fuse([ONE, TWO], "task_arithmetic", scaling=1.0), "q"))
    assert by_factors.tolist() == [[3.0, 1.0], [6.0, 2.0]]  # 0.5 [2 4]ᵀ [3 1]
    fused = linlora.fuse(delta_weight.stacked([ONE, TWO]), "task_arithmetic", scaling=1.0)
    assert fused.point["q.A0"].tolist() == [[1.0, 1.0], [3.0, 0.0]]
    assert fused.deltas["q.dB"].tolist() == [[1.0, 0.0], [0.0, 2.0]]  # the scaling is in B
    in_weights = fused.deltas["q.dB"] @ fused.point["q.A0"]
    assert in_weights.tolist() == [[1.0, 1.0], [6.0, 0.0]]
    summed = linlora.fuse(delta_weight.in_weights([ONE, TWO]), "task_arithmetic", scaling=1.0)
    assert torch.equal(matrix(summed.update("q")), in_weights)
    cross = 0.5 * (ONE.deltas["q.dB"] @ TWO.deltas["q.dA"] + TWO.deltas["q.dB"] @ ONE.deltas["q.dA"])
    assert torch.equal(by_factors, in_weights + cross)


def test_from_a_trained_start_the_change_is_that_of_the_product():
    vector = plain([[0.0, 1.0]], [[1.0], [0.0]], A0=[[1.0, 0.0]], B0=[[1.0], [2.0]])
    change = matrix(delta_weight.change(vector, "q"))
    assert change.tolist() == [[0.5, 1.0], [0.0, 1.0]]  # 0.5 ([2 2]ᵀ [1 1] − [1 2]ᵀ [1 0])
    (stacked,) = delta_weight.stacked([vector])
    assert torch.equal(stacked.deltas["q.dB"] @ stacked.point["q.A0"], change)


def test_cosines_of_delta_weights_are_those_of_the_matrices():
    vectors = [trained("bert", "warm", seed) for seed in (1, 2, 3)]
    flat = [torch.cat([m.flatten() for m in v.deltas.values()]).double() for v in delta_weight.dense(vectors)]
    expected = [[float(a @ b / (a.norm() * b.norm())) for b in flat] for a in flat]
    np.testing.assert_allclose(cosine_matrix(BY_KEY["delta_weight"], vectors), expected, atol=1e-6)
    assert np.abs(cosine_matrix(BY_KEY["factors"], vectors) - expected).max() > 1e-3


def start_of(architecture, start):
    model = tiny_model(architecture, trained=start == "warm")
    return model, TaskVector.from_model(model)


def trained(architecture, start, seed, kind="lora"):
    """A vector of a kind of training, moved at random from the common start."""
    model, origin = start_of(architecture, start)
    if kind in ("layer", "model"):
        linlora.linearize(model, scope=kind)
        kinds = ("lora_dA", "lora_dB") if start == "warm" else ("lora_B",)
        randomize(model, seed, kinds)
        return TaskVector.from_model(model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ("lora_A" in name and kind == "lora"):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return TaskVector.from_model(model, point=origin)


@torch.no_grad()
def output(model, architecture):
    return model(**tiny_batch(architecture))[0]


# gpt2's layers are Conv1D, weights transposed
CASES = [
    *((control.key, "bert", start, "average") for control in CONTROLS if control.key != "features" for start in STARTS),
    *(("delta_weight", "bert", start, method) for start in STARTS for method in ("ties", "adamerging")),
    *(("layer", "bert", start, "iso_c") for start in STARTS),
    *((key, "gpt2", "warm", method) for key, method in (("delta_weight", "average"), ("delta_weight", "ties"))),
    ("lora_fa", "gpt2", "warm", "average"),
]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_one_vector_put_back_is_the_model_that_was_trained(case):
    key, architecture, start, method = case
    control = BY_KEY[key]
    vectors = [trained(architecture, start, seed, control.trained) for seed in (1, 2)]
    at = space(control, tiny_base(architecture), vectors, method)
    for vector, converted in zip(vectors, at.vectors, strict=True):
        at.put(converted)
        expected = output(model_for(tiny_base(architecture), vector), architecture)
        torch.testing.assert_close(output(at.model, architecture), expected, rtol=1e-4, atol=1e-5)
    at.put(0.0 * at.vectors[0])
    start_model, _ = start_of(architecture, start)
    torch.testing.assert_close(output(at.model, architecture), output(start_model, architecture), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_a_stacked_sum_is_the_sum_in_the_weights(start):
    control, architecture, scalings = BY_KEY["delta_weight"], "gpt2", [0.7, -0.4]
    vectors = [trained(architecture, start, seed) for seed in (1, 2)]
    outputs = []
    for method in ("average", "ties"):
        at = space(control, tiny_base(architecture), vectors, method)
        at.put(linlora.fuse(at.vectors, "task_arithmetic", scaling=scalings))
        outputs.append(output(at.model, architecture))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    at = space(BY_KEY["factors"], tiny_base(architecture), vectors, "average")
    at.put(linlora.fuse(at.vectors, "task_arithmetic", scaling=scalings))
    assert (output(at.model, architecture) - outputs[0]).norm() > 1e-2 * outputs[0].norm()  # the cross terms


def test_lora_with_a_frozen_is_layer_scope_at_zero_and_nowhere_else():
    batch, labels = tiny_batch("bert"), torch.tensor([0, 1, 2])

    def train(model):
        losses = []
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            loss = cross_entropy(model(**batch).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    difference = {}
    for start in STARTS:
        frozen, origin = start_of("bert", start)
        linearized, _ = start_of("bert", start)
        freeze_A(frozen)
        linlora.linearize(linearized)
        losses = train(frozen), train(linearized)
        difference[start] = max(abs(a - b) for a, b in zip(*losses, strict=True))
        if start == "zero":
            vectors = [TaskVector.from_model(frozen, point=origin), TaskVector.from_model(linearized)]
            frozen_change, ours = (delta_weight.in_weights([vector])[0] for vector in vectors)
            assert (frozen_change - ours).norm() < 1e-4 * ours.norm()
    assert difference["zero"] < 1e-6
    assert difference["warm"] > 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: delta_weight.stacked([]), "no vectors"),
        (lambda: delta_weight.dense([trained("bert", "zero", 1, "model")]), "plain LoRA or of layer scope.*'model'"),
        (lambda: delta_weight.stacked([trained("bert", "zero", 1), trained("bert", "warm", 1)]), "different"),
    ],
)
def test_vectors_of_another_kind_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
