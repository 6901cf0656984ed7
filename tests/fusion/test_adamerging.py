"""AdaMerging against a training loop written with torch.func, in which autograd sees λ, in float64."""

import pytest
import torch
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import linlora
from linlora import TaskVector
from linlora.fusion.adamerging import mean_entropy
from linlora.testing import randomize, tiny_batch, tiny_model

TASKS = [[tiny_batch("bert", seed=1), tiny_batch("bert", seed=2)], [tiny_batch("bert", seed=3)]]
OPTIONS = {"steps": 4, "learning_rate": 0.05, "progress": False}


@pytest.fixture
def wide(vectors, at, scope, double):
    """(vectors, model), in float64."""
    model = at(scope).double()
    doubled = [
        TaskVector(**{**vars(v), "deltas": {name: delta.double() for name, delta in v.deltas.items()}}) for v in vectors
    ]
    return doubled, model


def logits_of_oracle(oracle, scope, deltas, batch):
    """F(δ) by a plain PEFT model: jvp of the whole network, or each layer as LoRA of the factors side by side."""
    point = {name: p.detach() for name, p in oracle.named_parameters() if "lora_" in name}
    by_parameter = {
        name: deltas[name.removeprefix("base_model.model.").replace(".lora_", ".d").removesuffix(".default.weight")]
        for name in point
    }
    if scope == "model":
        with sdpa_kernel(SDPBackend.MATH):
            f, tangent = jvp(lambda p: functional_call(oracle, p, (), batch)[0], (point,), (by_parameter,))
        return f + tangent
    factors = {}
    for name, value in point.items():
        change = by_parameter[name]
        if "lora_A" in name:
            factors[name] = torch.cat([value, change])
        else:
            factors[name] = torch.cat([value + change, value], dim=1)
    return functional_call(oracle, factors, (), batch)[0]


def entropy(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1).mean()


def trained_by_autograd(vectors, scope, level):
    oracle = tiny_model("bert", trained=True).double()
    layers = list(vectors[0].scalings)
    raw = torch.full((len(layers) if level == "layer" else 1, len(vectors)), 0.3, dtype=torch.float64)
    raw.requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=OPTIONS["learning_rate"])
    for step in range(OPTIONS["steps"]):
        lambdas = raw.clamp(0, 1)
        deltas = {}
        for name in vectors[0].deltas:
            row = layers.index(name[: -len(".dA")]) if level == "layer" else 0
            deltas[name] = sum(lambdas[row, i] * vector.deltas[name] for i, vector in enumerate(vectors))
        loss = sum(entropy(logits_of_oracle(oracle, scope, deltas, task[step % len(task)])) for task in TASKS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return raw.detach().clamp(0, 1)


@pytest.mark.parametrize("level", ["task", "layer"])
def test_the_weights_are_those_of_autograd_through_the_model(wide, scope, level, weights_in):
    vectors, model = wide
    fused = linlora.fuse(vectors, "adamerging", model=model, inputs=TASKS, level=level, **OPTIONS)
    theirs = trained_by_autograd(vectors, scope, level)
    assert (theirs - 0.3).abs().min() > 1e-3
    for row, found in enumerate(weights_in(fused, vectors).values()):
        torch.testing.assert_close(found, theirs[row if level == "layer" else 0], rtol=1e-7, atol=1e-7)


def test_the_model_becomes_more_certain_and_the_rest_stays_as_it_was(vectors, at, scope):
    model = at(scope).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"steps": 12, "learning_rate": 0.05, "inputs": TASKS, "level": "task"}
    fused = linlora.fuse(vectors, "adamerging", model=model, **options)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())

    def total(vector):
        linlora.apply(model.eval(), vector)
        return sum(float(mean_entropy(model(**batch).logits)) for task in TASKS for batch in task)

    assert total(fused) < total(linlora.fuse(vectors, scaling=0.3))


def test_plain_lora_is_merged_by_its_factors(double, weights_in):
    model = tiny_model("bert").double()
    start = TaskVector.from_model(model)
    vectors = []
    for seed in (1, 2):
        randomize(model, seed)
        vectors.append(TaskVector.from_model(model, point=start))
    lambdas = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([lambdas], lr=0.05)
    for _ in range(3):
        parameters = {
            f"base_model.model.{name[:-2]}lora_{name[-1]}.default.weight": start.point[f"{name[:-2]}{name[-1]}0"]
            + sum(lambdas[i] * vector.deltas[name] for i, vector in enumerate(vectors))
            for name in start.deltas
        }
        optimizer.zero_grad()
        entropy(functional_call(model, parameters, (), TASKS[0][0])[0]).backward()
        optimizer.step()
    options = {"level": "task", "steps": 3, "learning_rate": 0.05}
    fused = linlora.fuse(vectors, "adamerging", model=model, inputs=[TASKS[0][:1]], **options)
    for found in weights_in(fused, vectors).values():
        torch.testing.assert_close(found, lambdas.detach(), rtol=1e-7, atol=1e-7)


def test_weights_stay_between_zero_and_one(wide, weights_in):
    vectors, model = wide
    fused = linlora.fuse(vectors, "adamerging", model=model, inputs=TASKS, steps=4, learning_rate=1.0)
    found = torch.cat(list(weights_in(fused, vectors).values()))
    assert found.min() == pytest.approx(0.0, abs=1e-9)
    assert found.max() == pytest.approx(1.0)


def test_logits_can_be_any_function_of_model_and_batch(vectors, at, scope):
    """One head a task: the batch says which."""
    heads = torch.randn(2, 3, 5)
    inputs = [[(0, TASKS[0][0])], [(1, TASKS[1][0])]]
    seen = []

    def logits(model, batch):
        task, tokens = batch
        seen.append(task)
        return model(**tokens).logits @ heads[task]

    linlora.fuse(vectors, "adamerging", model=at(scope), inputs=inputs, logits=logits, steps=2)
    assert seen == [0, 1, 0, 1]


def test_entropy_by_hand():
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, 100.0]]])
    assert float(mean_entropy(logits)) == pytest.approx(torch.log(torch.tensor(2.0)).item() / 2)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"inputs": []}, "inputs holds no task"),
            ({"inputs": [TASKS[0], []]}, "no unlabeled batch of task 1"),
            ({"inputs": [iter(TASKS[0])]}, "no unlabeled batch of task 0, or no second pass"),
            ({"level": "tensor"}, "unknown level 'tensor'; choose 'task' or 'layer'"),
            ({"initial": float("nan")}, "initial has to be a finite number"),
            ({"initial": 1.5}, "initial is a λ, at least 0 and at most 1, got 1.5"),
            ({"steps": 2.5}, "steps has to be a whole number, at least 1, got 2.5"),
            ({"learning_rate": float("inf")}, "learning_rate has to be a finite number"),
            ({"logits": lambda model, batch: model(**batch).logits * float("nan")}, "the entropy of task 0 is nan"),
        ],
    )
    def test_options(self, vectors, at, scope, options, message):
        with pytest.raises(ValueError, match=message):
            linlora.fuse(vectors, "adamerging", **{"model": at(scope), "inputs": TASKS, "steps": 4, **options})

    def test_a_model_at_another_point(self, vectors, scope):
        model = tiny_model("bert", trained=True, seed=9)
        linlora.linearize(model, scope=scope)
        with pytest.raises(linlora.DifferentPointError, match="different linearization points"):
            linlora.fuse(vectors, "adamerging", model=model, inputs=TASKS)
