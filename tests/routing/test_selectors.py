"""The selectors by hand, and how examples, tokens and callers decide the weights."""

import pytest
import torch
from routed_models import fill, mixed_by_hand, routed_model, task_alone
from torch import nn

from linlora import routing
from linlora.routing.granularity import selector_of

SIZES = routing.Sizes(n_tasks=4, n_skills=3, n_heads=2, in_features=8)
TASKS = torch.tensor([3, 0, 3])


def poly(**options):
    return fill(routing.Poly(SIZES, **options)).train()


def p_of(selector):
    return torch.sigmoid(selector.logits[TASKS]).view(3, 2, 3)


def normalized(p):
    return p / (p.sum(-1, keepdim=True) + 1e-12)


def test_plain_weights_are_normalized_sigmoids():
    torch.testing.assert_close(poly().weights(TASKS), normalized(p_of(poly())))


def test_fresh_logits_are_small_and_uniform():
    logits = routing.Poly(SIZES).logits
    assert 0 < logits.abs().max() <= 1e-3


def test_relaxed_bernoulli_samples_in_training_alone():
    selector = poly(sampling="relaxed_bernoulli")
    assert selector.samples
    assert not torch.equal(selector.weights(TASKS), selector.weights(TASKS))
    selector.eval()
    assert not selector.samples
    torch.testing.assert_close(selector.weights(TASKS), normalized(p_of(selector)))


def test_straight_through_rounds_forward_and_not_backward():
    selector = poly(sampling="straight_through")
    p = p_of(selector)
    for training in (True, False):
        w = selector.train(training).weights(TASKS)
        torch.testing.assert_close(w, normalized(p.round()))
    g = torch.randn_like(w)
    (gradient,) = torch.autograd.grad(w, selector.logits, g)
    leaf = p.round().detach().requires_grad_()  # d normalized at the rounded values, times dσ
    (through,) = torch.autograd.grad(normalized(leaf), leaf, g)
    expected = torch.zeros_like(selector.logits).index_add(0, TASKS, (through * p * (1 - p)).flatten(1))
    torch.testing.assert_close(gradient, expected)


def test_l2_norm_is_of_the_logits():
    selector = poly(l2_norm=True)
    Z = selector.logits[TASKS].view(3, 2, 3)
    torch.testing.assert_close(selector.weights(TASKS), Z / Z.norm(dim=-1, keepdim=True))


def test_the_shared_skill_is_always_on():
    selector = poly(shared_skill=True)
    p = p_of(selector).clone()
    p[..., -1] = 1.0
    torch.testing.assert_close(selector.weights(TASKS), normalized(p))


def test_logit_dropout_drops_skills_in_training():
    selector = poly(logit_dropout=0.5)
    assert selector.samples
    w = torch.stack([selector.weights(TASKS) for _ in range(50)])
    assert (w == 0.0).any()
    torch.testing.assert_close(w.sum(-1)[w.sum(-1) > 0.5], torch.ones(int((w.sum(-1) > 0.5).sum())))
    torch.testing.assert_close(selector.eval().weights(TASKS), normalized(p_of(selector)))


def test_the_gradient_of_the_logits_is_that_of_the_formula():
    selector = poly()
    w = selector.weights(torch.arange(4))
    dw = torch.randn_like(w)
    (dz,) = torch.autograd.grad(w, selector.logits, dw)
    p = torch.sigmoid(selector.logits).view(4, 2, 3)
    expected = p * (1 - p) / p.sum(-1, keepdim=True) * (dw - (w * dw).sum(-1, keepdim=True))
    torch.testing.assert_close(dz.view(4, 2, 3), expected)


def test_names_of_blocks():
    assert selector_of("model.layers.3.self_attn.q_proj", "block") == "model.layers.3"
    assert selector_of("2", "block") == "2"
    assert selector_of("model.layers.3.self_attn.q_proj", "layer") == "model.layers.3.self_attn.q_proj"


# -- who decides the weights ----------------------------------------------------------------------------------------


def test_weights_of_the_caller_per_example(batch, ids):
    routed = routed_model(granularity="model")
    selector = routed.selectors[0]
    by_id = routed(**batch, task_ids=ids).logits
    torch.testing.assert_close(routed(**batch, mixture=selector.weights(ids)).logits, by_id)
    torch.testing.assert_close(routed(**batch, mixture=selector.weights(ids).detach()).logits, by_id)
    same = routed(**batch, mixture=selector.weights(ids[:1]).detach().expand(5, -1, -1)).logits  # all rows agree
    torch.testing.assert_close(same, task_alone(routed, 2, **batch))
    shared_by_heads = torch.softmax(torch.randn(5, 3, dtype=torch.float64), -1)
    torch.testing.assert_close(
        routed(**batch, mixture=shared_by_heads).logits,
        routed(**batch, mixture=shared_by_heads.unsqueeze(1).expand(-1, 4, -1)).logits,
    )
    halves = [[0.5, 0.5, 0.0]] * 5
    torch.testing.assert_close(
        routed(**batch, mixture=halves).logits, routed(**batch, mixture=torch.tensor(halves)).logits
    )


def test_gradients_reach_the_weights_of_the_caller(batch):
    routed = routed_model()
    w = torch.rand(5, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: routed(**batch, mixture=w).logits.sum(1), w, atol=1e-6)


def test_weights_and_tasks_per_token():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    routed = fill(routing.route(base, 4, n_skills=3, n_heads=2, rank=2, target_modules=["0", "1"]))
    x, ids = torch.randn(3, 5, 8, dtype=torch.float64), torch.randint(4, (3, 5))
    y = routed(x, task_ids=ids)
    alone = routed(x.flatten(0, 1).unsqueeze(1), task_ids=ids.flatten()).view_as(y)
    torch.testing.assert_close(y, alone)
    w = torch.rand(3, 5, 2, 3, dtype=torch.float64)
    y = routed(x, mixture=w)
    for row, column in ((0, 0), (2, 4)):
        h = x[row, column]
        for layer in routed.layers:
            A_z, B_z = mixed_by_hand(layer.lora_A, layer.lora_B, w[row, column])
            h = layer.base_layer(h) + layer.sizes.scaling * h @ A_z @ B_z
        torch.testing.assert_close(y[row, column], h)
    with pytest.raises(ValueError, match=r"layer '0': the routing is of \(3, 5\) tokens, which an input \(3, 6, 8\)"):
        routed(torch.randn(3, 6, 8, dtype=torch.float64), task_ids=ids)


def test_weights_that_do_not_fit(batch):
    routed = routed_model()
    for shape, message in (((5, 2, 3), "3 skills in 4 heads"), ((4, 3), "5 examples"), ((5,), "are expected")):
        with pytest.raises(ValueError, match=f"mixture: got .*{message}"):
            routed(**batch, mixture=torch.ones(shape))


def test_a_selector_of_your_own(batch, ids, tmp_path):
    class Nearest(routing.Selector):
        """Per token, the skill whose key is nearest."""

        variant = "nearest"
        reads = "input"

        def __init__(self, sizes, temperature=1.0):
            super().__init__(sizes, temperature=temperature)
            self.keys = nn.Parameter(torch.randn(sizes.n_skills, sizes.in_features))

        def weights(self, x):
            w = torch.softmax(x @ self.keys.t() / self.options["temperature"], -1)
            return w.unsqueeze(-2).expand(*w.shape[:-1], self.sizes.n_heads, self.sizes.n_skills)

    routed = routed_model(variant=Nearest, temperature=0.5, target_modules=["query"], dtype=torch.float32)
    y = routed(**batch).logits
    routed.save_pretrained(tmp_path)
    from linlora.testing import tiny_base

    again = routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path, variants=[Nearest])
    torch.testing.assert_close(again(**batch).logits, y)
    with pytest.raises(ValueError, match="unknown selector 'nearest'"):
        routing.RoutedModel.from_pretrained(tiny_base("bert"), tmp_path)
