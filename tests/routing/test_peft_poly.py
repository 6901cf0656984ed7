"""convert: a PEFT Poly model and the routed model of its parameters are one function, in training and after."""

import copy

import peft
import pytest
import torch
from routed_models import fill
from torch.distributions import RelaxedBernoulli

import linlora
from linlora import routing
from linlora.testing import tiny_base, tiny_batch, tiny_model


def poly_model(architecture="t5", dtype=torch.float64, dropout=True, **options):
    """The configuration of PEFT's own Poly test (r 8, 3 tasks, 2 skills, 4 splits), randomly filled."""
    options = {"r": 8, "n_tasks": 3, "n_skills": 2, "n_splits": 4, "target_modules": ["q", "v"], **options}
    base = tiny_base(architecture, **({} if dropout else {"dropout_rate": 0.0}))
    model = peft.get_peft_model(base, peft.PolyConfig(task_type="SEQ_2_SEQ_LM", **options)).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.0 if "logits" in name else 0.2))
    return model.eval()


def pair(**options):
    model = poly_model(**options)
    return copy.deepcopy(model), routing.convert(model)


def gradients(model, loss):
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    kinds = {"logits": {}, "lora_A": {}, "lora_B": {}}
    for name, gradient in found.items():
        kind = next(kind for kind in kinds if kind in name)
        layer = name.removeprefix("base_model.").removeprefix("model.").split(".poly_")[0].split(".lora_")[0]
        kinds[kind][len(kinds[kind]) if kind == "logits" else layer] = gradient
    return kinds


@pytest.fixture
def inputs():
    return {**tiny_batch("t5", 5), "task_ids": torch.arange(5) % 3, "labels": torch.randint(1, 64, (5, 7))}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("options", [{}, {"n_splits": 1}, {"r": 1, "n_skills": 5}, {"n_tasks": 7, "n_splits": 2}])
def test_outputs_loss_and_every_gradient_are_equal(options, training, inputs):
    outputs = []
    for model in pair(dropout=False, **options):
        torch.manual_seed(11)  # in training, both take the same samples of RelaxedBernoulli
        output = model.train(training)(**inputs)
        outputs.append((output.logits, output.loss, gradients(model, output.loss)))
    (logits, loss, expected), (our_logits, our_loss, ours) = outputs
    torch.testing.assert_close(our_logits, logits, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(our_loss, loss)
    for kind, wanted in expected.items():
        assert wanted.keys() == ours[kind].keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(ours[kind][name], gradient, rtol=1e-6, atol=1e-12)


def test_training_follows_pefts(inputs):
    losses = []
    for model in pair(dropout=False):
        model.train()
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        torch.manual_seed(0)
        for _ in range(4):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


def test_an_optimizer_of_the_peft_model_goes_on(inputs):
    model = poly_model(dropout=False)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    routed = routing.convert(model)
    before = routed(**inputs).loss
    before.backward()
    optimizer.step()
    assert routed(**inputs).loss < before


def test_task_ids_go_wherever_they_went(inputs):
    stock, routed = pair()
    plain = {name: inputs[name] for name in ("input_ids", "task_ids")}
    torch.testing.assert_close(routed.base_model(**inputs).logits, stock.base_model(**inputs).logits)
    torch.testing.assert_close(
        routed.base_model.generate(**plain, max_new_tokens=5), stock.base_model.generate(**plain, max_new_tokens=5)
    )
    torch.testing.assert_close(routed.generate(**plain, max_new_tokens=5), stock.generate(**plain, max_new_tokens=5))
    with routed.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(routed(**inputs).logits, stock(**inputs).logits)


def test_a_peft_checkpoint_is_read(tmp_path, inputs):
    stock = poly_model(dtype=torch.float32)
    stock.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = peft.PeftModel.from_pretrained(tiny_base("t5"), tmp_path, is_trainable=trainable)
        routed = routing.convert(loaded)
        torch.testing.assert_close(routed(**inputs).logits, stock(**inputs).logits, rtol=1e-4, atol=1e-5)
        assert any(p.requires_grad for p in routed.parameters()) == trainable


def test_a_trained_head_comes_along():
    base = tiny_base("bert")
    config = peft.PolyConfig(
        task_type="SEQ_CLS", n_tasks=3, n_skills=2, target_modules=["query"], modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(base, config)
    torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    inputs = {**tiny_batch("bert"), "task_ids": torch.tensor([0, 2, 1])}
    expected = model.eval()(**inputs).logits
    routed = routing.convert(model)
    torch.testing.assert_close(routed(**inputs).logits, expected)
    assert routed.modules_to_save == ("classifier",)
    assert routed.model.classifier.weight.requires_grad


def test_linearized_it_has_the_same_function_to_first_order_around_the_mean(inputs):
    model = poly_model()
    routed = routing.convert(copy.deepcopy(model), linearized=True)
    assert {layer.state for layer in routed.routed_layers} == {"pair"}
    routing.mhr_mu(routed)
    stock = routing.convert(model)
    routing.mhr_mu(stock)
    torch.testing.assert_close(routed(**inputs).logits, stock(**inputs).logits)  # at the mean: exactly


def test_peft_samples_as_the_selector_does():
    """RelaxedBernoulli(1, logits) by its definition: σ(logit U + Z) of a uniform U."""
    torch.manual_seed(5)
    sizes = routing.Sizes(n_tasks=4, n_skills=3, n_heads=2, in_features=8)
    poly = fill(routing.Poly(sizes, sampling="relaxed_bernoulli")).train()
    ids = torch.tensor([0, 3, 0])
    torch.manual_seed(7)
    w = poly.weights(ids)
    torch.manual_seed(7)
    p = RelaxedBernoulli(1.0, logits=poly.logits[ids].view(3, 2, 3)).rsample()
    torch.testing.assert_close(w, p / p.sum(-1, keepdim=True))
    assert not torch.allclose(w[0], w[2])  # by the example, not by the task


class TestRefusals:
    def test_models_without_poly(self):
        with pytest.raises(TypeError, match=r"Poly adapter .*got PeftModel.* of LoraModel"):
            routing.convert(tiny_model("bert"))
        with pytest.raises(TypeError, match="got BertForSequenceClassification"):
            routing.convert(tiny_base("bert"))

    def test_several_adapters(self):
        config = peft.PolyConfig(n_tasks=2, n_skills=2, target_modules=["query"])
        model = peft.get_peft_model(tiny_base("bert"), config)
        model.add_adapter("second", config)
        with pytest.raises(ValueError, match=r"got \['default', 'second'\], active \['default'\]; the others would be"):
            routing.convert(model)
        model.delete_adapter("second")
        assert routing.convert(model).n_tasks == 2

    def test_heads_that_do_not_divide(self):
        model = peft.get_peft_model(
            tiny_base("bert"), peft.PolyConfig(n_tasks=2, n_skills=2, n_splits=5, target_modules=["query"])
        )
        with pytest.raises(ValueError, match=r"layer 'bert.*query': n_heads = 5 does not divide its 32 inputs"):
            routing.convert(model)


def test_converted_models_are_saved_and_linearized(tmp_path, inputs):
    routed = routing.convert(poly_model(dtype=torch.float32))
    linlora.linearize(routed, "model")
    routed.save_pretrained(tmp_path)
    again = routing.RoutedModel.from_pretrained(tiny_base("t5"), tmp_path)
    torch.testing.assert_close(again(**inputs).logits, routed(**inputs).logits)
