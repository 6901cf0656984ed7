"""RegMean against its normal equations on dense matrices, in float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import linlora
from linlora import TaskVector, WeightVector
from linlora.fusion.regmean import input_moments
from linlora.testing import randomize, relative_error, tiny_batch, tiny_model
from linlora.vectors.points import point_hash

SIZE = {"q": (6, 10), "k": (9, 7)}


def adapter(seed, rank=2, layers=("q", "k")):
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in layers:
        outputs, inputs = SIZE[layer]
        deltas[f"{layer}.dA"] = torch.randn(rank, inputs, generator=generator)
        deltas[f"{layer}.dB"] = torch.randn(outputs, rank, generator=generator)
    return WeightVector(deltas, {}, point_hash({}), dict.fromkeys(layers, 1.5), "weight")


def dense(vector, layer):
    if layer not in vector.scalings:
        return torch.zeros(SIZE[layer], dtype=torch.float64)
    A, B = (vector.deltas[f"{layer}.{kind}"].double() for kind in ("dA", "dB"))
    return vector.scalings[layer] * B @ A


def moments(seed, rows=40):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer, (_, inputs) in SIZE.items():
        x = torch.randn(rows, inputs, generator=generator) * torch.rand(inputs, generator=generator)
        found[layer] = x.T @ x / rows
    return found


VECTORS = [adapter(1), adapter(2, 3, ("q",)), adapter(3, 4)]
MOMENTS = [moments(1), moments(2), moments(3)]


@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("diagonal", [False, True], ids=["matrix", "diagonal"])
def test_the_result_solves_the_normal_equations(shrink, diagonal):
    given = [{n: G.diagonal() if diagonal else G for n, G in task.items()} for task in MOMENTS]
    fused = linlora.fuse(VECTORS, "regmean", inputs=given, shrink=shrink, scaling=0.7)
    for layer in SIZE:
        grams = []
        for task in MOMENTS:
            G = task[layer].double()
            grams.append(torch.diag(G.diagonal()) if diagonal else shrink * G + (1 - shrink) * torch.diag(G.diagonal()))
        top = sum(dense(vector, layer) @ G for vector, G in zip(VECTORS, grams, strict=True))
        assert relative_error(dense(fused, layer), 0.7 * top @ torch.linalg.inv(sum(grams))) < 1e-5
    assert {name: size.rank for name, size in fused.sizes().items()} == {"q": 9, "k": 6}


def test_the_order_of_the_tasks_changes_no_bit():
    one = linlora.fuse(VECTORS, "regmean", inputs=MOMENTS)
    other = linlora.fuse(VECTORS[::-1], "regmean", inputs=MOMENTS[::-1])
    assert all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas)


@pytest.mark.parametrize("form", ["Z", "G", "diagonal"])
def test_linearized_adapters_of_one_point_are_averaged_in_dB(form):
    """The best among s dB A0: the gradient of Σ E ‖(dB − dBₜ) A0 x‖² is zero."""
    vectors = []
    for seed in (1, 2, 3):
        model = tiny_model("bert")
        linlora.linearize(model)
        randomize(model, seed, ("lora_B",))
        vectors.append(TaskVector.from_model(model))
    layer = next(iter(vectors[0].scalings))
    A0 = vectors[0].point[f"{layer}.A0"].double()
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(50, A0.shape[1], generator=generator).double() for _ in vectors]
    grams = [x.T @ x / 50 for x in xs]
    if form == "diagonal":
        grams = [torch.diag(G.diagonal()) for G in grams]
    given = []
    for G in grams:
        moment = {"Z": A0 @ G @ A0.T, "G": G, "diagonal": G.diagonal()}[form]
        ones = {n: torch.eye(len(A0)) for n in vectors[0].scalings}
        given.append({**ones, layer: moment})
    fused = linlora.fuse(vectors, "regmean", inputs=given, shrink=1.0)
    assert fused.scope == "layer"
    dBs = [vector.deltas[f"{layer}.dB"].double() for vector in vectors]
    found = fused.deltas[f"{layer}.dB"].double()
    gradient = sum((found - dB) @ A0 @ G @ A0.T for dB, G in zip(dBs, grams, strict=True))
    size = sum((dB @ A0 @ G @ A0.T).norm() for dB, G in zip(dBs, grams, strict=True))
    assert gradient.norm() < 1e-5 * size
    other = linlora.fuse([vectors[i] for i in (1, 2, 0)], "regmean", inputs=[given[i] for i in (1, 2, 0)], shrink=1.0)
    assert all(torch.equal(fused.deltas[name], other.deltas[name]) for name in fused.deltas)


def test_the_first_vector_has_no_say_in_dtype_and_point():
    model, vectors = tiny_model("bert"), []
    linlora.linearize(model)
    for seed in (1, 2):
        randomize(model, seed, ("lora_B",))
        vectors.append(TaskVector.from_model(model))
    deltas = {name: delta.bfloat16() for name, delta in vectors[0].deltas.items()}
    pair = [replace(vectors[0], deltas=deltas, point=None), vectors[1]]
    inputs = [{layer: torch.eye(4) for layer in pair[0].scalings}] * 2
    one, other = (linlora.fuse(pair[::step], "regmean", inputs=inputs) for step in (1, -1))
    for fused in (one, other):
        assert fused.point is not None
        assert {delta.dtype for delta in fused.deltas.values()} == {torch.float32}
        assert all(torch.equal(fused.deltas[name], delta) for name, delta in one.deltas.items())


def test_inputs_that_are_always_zero_have_no_weight():
    given = [dict(task) for task in MOMENTS]
    for task in given:
        task["q"] = task["q"].clone()
        task["q"][3], task["q"][:, 3] = 0.0, 0.0
    fused = linlora.fuse(VECTORS, "regmean", inputs=given)
    assert dense(fused, "q")[:, 3].norm() == 0.0
    assert torch.isfinite(dense(fused, "q")).all()


@pytest.mark.parametrize("prepare", [lambda model: None, linlora.linearize], ids=["PEFT", "linearized"])
def test_moments_are_those_of_the_inputs_without_padding(prepare):
    model = tiny_model("bert", trained=True)
    prepare(model)
    batch = tiny_batch("bert")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 4:] = 0
    seen = []
    name = "bert.encoder.layer.1.output.dense"
    handle = model.base_model.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch, attention_mask=mask)
    handle.remove()
    found = input_moments(model, [{**batch, "attention_mask": mask}] * 2, [name, "bert.pooler.dense"])
    rows = seen[0].detach()[mask.bool()].double()
    assert relative_error(found[name], rows.T @ rows / len(rows)) < 1e-5
    diagonal = input_moments(model, [{**batch, "attention_mask": mask}], [name], diagonal=True)[name]
    assert relative_error(diagonal, rows.square().mean(0)) < 1e-5
    assert not any(isinstance(module, nn.Module) and module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": MOMENTS[:2]}, "inputs of 2 tasks for 3 vectors"),
        ({"inputs": [MOMENTS[0], {"q": MOMENTS[1]["q"]}, MOMENTS[2]]}, "vector 2 have no moments of layer 'k'"),
        ({"inputs": [{**task, "k": torch.eye(3)} for task in MOMENTS]}, r"layer 'k' has 7 inputs, .* got \(3, 3\)"),
        ({"inputs": [moments(s, 2) for s in range(3)], "shrink": 1.0}, "do not span its input space.*shrink below 1"),
        ({"inputs": [{**task, "k": task["k"] * float("nan")} for task in MOMENTS]}, "hold NaN"),
        ({"inputs": MOMENTS, "shrink": 1.5}, "shrink is at least 0 and at most 1"),
    ],
)
def test_what_cannot_be_solved(change, message):
    with pytest.raises(ValueError, match=message):
        linlora.fuse(VECTORS, "regmean", **change)


def test_vectors_at_another_start_are_told_to_be_cast():
    model = tiny_model("bert", trained=True)
    linlora.linearize(model)
    with pytest.raises(ValueError, match=r"start at B0 = 0 .*vector\.cast\('weight'\)"):
        linlora.fuse([TaskVector.from_model(model)], "regmean", inputs=[{}])
