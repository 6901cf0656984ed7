"""Products with the Jacobian of a whole network, and the solver that stands on them."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, one_hot
from transformers import ViTConfig, ViTForImageClassification

import linlora
from linlora.functional import jvp, solve, vjp
from linlora.task_vector import delta_parameters
from linlora.testing import randomize, tiny_batch, tiny_model


def linearized(architecture="bert", trained=True):
    model = tiny_model(architecture, trained).double()
    linlora.linearize(model, scope="model")
    randomize(model, 5, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    return model


def random_vector(model):
    vector = linlora.TaskVector.from_model(model)
    return replace(vector, deltas={name: torch.randn_like(delta) for name, delta in vector.deltas.items()})


def batch_of(architecture):
    return {n: x.double() if x.is_floating_point() else x for n, x in tiny_batch(architecture).items()}


@pytest.mark.parametrize("architecture", ["bert", "vit", "t5", "gpt2"])
@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
def test_jvp_and_vjp_equal_torch_func_at_the_point(double, architecture, trained):
    model, peft = linearized(architecture, trained), tiny_model(architecture, trained).double()
    vector, batch = random_vector(model), batch_of(architecture)
    point = {n: p.detach() for n, p in peft.named_parameters() if "lora_" in n}
    delta = {}
    for name, value in point.items():
        kind, layer = name[name.index("lora_") + 5], name.split(".lora_")[0].removeprefix("base_model.model.")
        delta[name] = vector.deltas.get(f"{layer}.d{kind}", torch.zeros_like(value))

    def f(parameters):
        return torch.func.functional_call(peft, parameters, (), batch)[0]

    with sdpa_kernel(SDPBackend.MATH):
        expected, expected_tangent = torch.func.jvp(f, (point,), (delta,))
        _, pull = torch.func.vjp(f, point)
    output, tangent = jvp(model, vector, batch)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(tangent, expected_tangent)
    output, pullback = vjp(model, batch)
    torch.testing.assert_close(output, expected)
    g = torch.randn_like(output)
    gradient = pullback(g)
    assert gradient.dot(vector) == pytest.approx(float((g * tangent).sum()), rel=1e-10)
    for name, value in pull(g)[0].items():
        kind, layer = name[name.index("lora_") + 5], name.split(".lora_")[0].removeprefix("base_model.model.")
        if f"{layer}.d{kind}" in gradient.deltas:
            torch.testing.assert_close(gradient.deltas[f"{layer}.d{kind}"], value)


def test_products_leave_the_model_as_it_was():
    model = linearized().train()
    model.requires_grad_(False)
    before = {name: p.clone() for name, p in delta_parameters(model).items()}
    jvp(model, random_vector(model), batch_of("bert"))
    output, pullback = vjp(model, batch_of("bert"))
    assert (pullback(output) - pullback(output)).norm() == 0  # it may be called again
    assert model.training
    for name, parameter in delta_parameters(model).items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_products_refuse_what_they_cannot_do():
    model, batch = linearized(), batch_of("bert")
    with pytest.raises(ValueError, match="leave 'labels' out"):
        vjp(model, {**batch, "labels": torch.tensor([0, 1, 2])})
    layer = tiny_model("bert", True)
    linlora.linearize(layer)
    with pytest.raises(ValueError, match=r"linearize\(model, scope='model'\)"):
        vjp(layer, batch)
    with pytest.raises(linlora.DifferentPointError):
        jvp(model, linlora.TaskVector.from_model(layer), batch)


def test_solve_reaches_the_minimum_of_the_squared_loss():
    model, batch = linearized(trained=False), batch_of("bert")
    labels = torch.randn(3, 3, dtype=torch.float64)
    ridge = 1e-2
    solution = solve(model, [{**batch, "labels": labels}], "squared", ridge=ridge, steps=2, iterations=12)
    origin = 0.0 * linlora.TaskVector.from_model(model)
    f, pullback = vjp(model, batch)
    J = torch.stack([
        torch.cat([d.flatten() for d in pullback(e.view(3, 3)).deltas.values()])
        for e in torch.eye(9, dtype=torch.float64)
    ])  # fmt: skip
    exact = torch.linalg.solve(J.t() @ J / 3 + ridge * torch.eye(J.shape[1]), J.t() @ (labels - f).flatten() / 3)
    found = torch.cat([d.flatten() for d in solution.vector.deltas.values()])
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    assert (solution.vector - origin).norm() > 0
    assert 10 <= solution.passes < 2 * 13  # of 9 outputs conjugate gradient is done after 9 iterations


def test_solve_lowers_the_logistic_loss_at_every_step_and_says_what_the_model_then_has():
    model, batch = linearized(), batch_of("bert")
    data = [{**{n: x[i : i + 1] for n, x in batch.items()}, "labels": torch.tensor([i])} for i in range(3)]
    solution = solve(model, data, steps=3)
    assert list(solution.losses) == sorted(solution.losses, reverse=True)
    linlora.apply(model, solution.vector)
    loss = cross_entropy(model(**batch).logits, torch.tensor([0, 1, 2]))
    assert loss.item() == pytest.approx(solution.losses[-1], rel=1e-9)


def test_solve_names_what_does_not_fit():
    model, batch = linearized(), batch_of("bert")
    with pytest.raises(ValueError, match="have 'labels'"):
        solve(model, [batch])
    with pytest.raises(ValueError, match="non-empty"):
        solve(model, [])
    with pytest.raises(ValueError, match=r"ridge is positive, got -1\.0"):
        solve(model, [{**batch, "labels": torch.tensor([0, 1, 2])}], ridge=-1.0)
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        solve(model, [{**batch, "labels": torch.tensor([0, 1, 2])}], "hinge")
    with pytest.raises(ValueError, match=r"floats \(3, 3\) are expected"):
        solve(model, [{**batch, "labels": torch.tensor([0, 1, 2])}], "squared")


def digits(rows=128):
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images[:rows], dtype=torch.float32).view(-1, 1, 8, 8) / 8.0 - 1.0
    return [
        {"pixel_values": pixels[i : i + 64], "labels": torch.tensor(labels[i : i + 64])} for i in range(0, rows, 64)
    ]


def small_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )  # fmt: skip
    model = get_peft_model(ViTForImageClassification(config), LoraConfig(r=8, target_modules="all-linear"))
    linlora.linearize(model, scope="model")
    return model


@pytest.mark.parametrize(("loss", "steps", "iterations"), [("logistic", 3, 15), ("squared", 1, 47)])
def test_solve_beats_the_same_number_of_adamw_passes_on_handwritten_digits(loss, steps, iterations):
    data = digits()
    if loss == "squared":
        data = [{**batch, "labels": one_hot(batch["labels"], 10).float()} for batch in data]
    solution = solve(small_vit(), data, loss, ridge=1e-6, steps=steps, iterations=iterations)
    assert solution.passes == 48

    def loss_of(model, batch):
        logits = model(pixel_values=batch["pixel_values"]).logits
        if loss == "logistic":
            return cross_entropy(logits, batch["labels"])
        return 0.5 * (logits - batch["labels"]).square().sum(-1).mean()

    def adamw(rate):
        model = small_vit()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        for batch in data * solution.passes:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return sum(loss_of(model, batch).item() for batch in data) / len(data)

    assert solution.losses[-1] < min(adamw(rate) for rate in (1e-2, 3e-2))
