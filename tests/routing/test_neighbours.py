"""MoDE and AdaMix by their papers' formulas, row by row; the mean and the logits of a trained inventory."""

import pytest
import torch
from routed_models import folded, mixed_by_hand, routed_model
from torch import nn

from linlora import routing
from linlora.testing import tiny_base

# -- MoDE (arXiv 2408.01505) ------------------------------------------------------------------------------------------


def mode_layer(rank=3, experts=4, dtype=torch.float64, bias=True):
    base = nn.Sequential(nn.Linear(6, 5, bias=bias)).to(dtype)
    routed = routing.route(base, 1, variant="mode", n_skills=experts, rank=rank, alpha=2.0, target_modules=["0"])
    for parameter in routed.skills():
        nn.init.normal_(parameter)
    return routed


@pytest.mark.parametrize(("rank", "experts"), [(3, 4), (1, 1), (1, 4), (4, 1)])
def test_mode_chooses_a_rank_one_expert_for_every_token_and_rank_slot(rank, experts):
    routed = mode_layer(rank, experts)
    layer = routed.layers[0]
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    y = routed(x)
    for row, column in ((0, 0), (1, 2)):
        token = x[row, column]
        expected = layer.base_layer(token)
        for i in range(rank):
            scores = torch.stack([layer.lora_router[i, j] @ token for j in range(experts)])
            pi = scores.exp() / scores.exp().sum()
            expert = sum(pi[j] * layer.lora_B[:, i, j] for j in range(experts))
            expected = expected + 2.0 / rank * (layer.lora_A[i] @ token) * expert
        torch.testing.assert_close(y[row, column], expected)


def test_every_gradient_of_mode():
    routed = mode_layer(2, 3)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    names = [n for n, p in routed.named_parameters() if p.requires_grad]
    assert {name.rsplit(".", 1)[-1] for name in names} == {"lora_A", "lora_B", "lora_router"}

    def run(x, *values):
        return torch.func.functional_call(routed, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in routed.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(run, (x, *values))


def test_fresh_mode_keeps_the_function_and_needs_no_task_ids(batch):
    base = tiny_base("bert")
    expected = base(**batch).logits
    routed = routing.route(base, 1, variant="mode", rank=2, n_skills=3, target_modules=["query", "dense"])
    torch.testing.assert_close(routed(**batch).logits, expected)
    assert "query            32 -> 32, rank 2, 3 experts a rank slot" in str(routed.report())
    assert not torch.allclose(_filled(routed)(**batch).logits, expected)
    with routed.disable_adapter():
        torch.testing.assert_close(routed(**batch).logits, expected)


def test_what_mode_does_not_have_is_refused(batch):
    for options, message in (({"n_heads": 2}, "not heads"), ({"dropout": 0.1}, "no dropout")):
        with pytest.raises(ValueError, match=rf"layer 'bert.*query': MoDE .*{message}"):
            routing.route(tiny_base("bert"), 1, variant="mode", target_modules=["query"], **options)
    with pytest.raises(TypeError, match="takes no option"):
        routing.route(tiny_base("bert"), 1, variant="mode", target_modules=["query"], sampling=None)
    routed = routing.route(tiny_base("bert"), 1, variant="mode", target_modules=["query"])
    with pytest.raises(ValueError, match="is not linearized"):
        routed.linearize("layer")
    with pytest.raises(ValueError, match="no inventory that weights could mix"):
        routed(**batch, mixture=torch.ones(5, 3))


def _filled(routed):
    for parameter in routed.skills():
        nn.init.normal_(parameter, std=0.3)
    return routed


# -- AdaMix (arXiv 2205.12410) ----------------------------------------------------------------------------------------


def test_adamix_takes_one_skill_for_A_and_one_for_B_in_training_and_their_means_after(batch):
    routed = routed_model(variant="adamix", target_modules=["query"])
    (layer, _), x = routed.routed_layers, torch.randn(4, 5, 32, dtype=torch.float64)

    def alone(A, B):
        return layer.base_layer(x) + layer.sizes.scaling * x @ A @ B

    def run():
        with routed.context.running(routing.batch.route_tasks(routed.routed_layers, None, 0, None)):
            return layer(x)

    routed.eval()
    uniform = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(run(), alone(*mixed_by_hand(layer.lora_A, layer.lora_B, uniform)))
    layer.train()
    layer.selector.train()
    skills = torch.eye(3, dtype=torch.float64).unsqueeze(1).expand(-1, 4, -1)
    seen = set()
    for _ in range(40):
        y = run()
        for i in range(3):
            for j in range(3):
                A = mixed_by_hand(layer.lora_A, layer.lora_B, skills[i])[0]
                B = mixed_by_hand(layer.lora_A, layer.lora_B, skills[j])[1]
                if torch.allclose(y, alone(A, B)):
                    seen.add((i, j))
    assert len(seen) >= 6  # of the nine pairs
    assert any(i != j for i, j in seen)


def test_adamix_trains_what_it_chose():
    routed = routed_model(variant="adamix", target_modules=["query"]).train()
    torch.manual_seed(0)
    routed(input_ids=torch.ones(2, 4, dtype=torch.long)).logits.sum().backward()
    layer = routed.routed_layers[0]
    assert int((layer.lora_A.grad.abs().sum((0, 2, 3)) > 0).sum()) == 1
    assert int((layer.lora_B.grad.abs().sum((0, 2, 3)) > 0).sum()) == 1


# -- -z and -μ --------------------------------------------------------------------------------------------------------


def test_the_mean_of_the_skills_is_the_adapter_of_their_means(batch):
    routed = routed_model()

    def delta_weight(layer):
        A_z, B_z = mixed_by_hand(layer.lora_A, layer.lora_B, torch.full((4, 3), 1 / 3, dtype=torch.float64))
        return (A_z @ B_z).t()

    expected = folded(routed, delta_weight, lambda: routed(**batch).logits)
    report = routing.mhr_mu(routed)
    assert report.trainable["selectors"] == 0
    torch.testing.assert_close(routed(**batch).logits, expected)
    torch.testing.assert_close(routed(**batch, task_ids=[9] * 5).logits, expected)  # whatever the task


def test_logits_of_a_new_task_alone_train(batch):
    routed = routed_model(modules_to_save=["classifier"])
    routing.mhr_z(routed)
    routing.mhr_z(routed, n_tasks=2)  # ids 5 and 6; 4 has been adapted to before
    assert routed.n_tasks == 7
    names = {n for n, p in routed.named_parameters() if p.requires_grad}
    assert names == {f"selectors.{i}.logits" for i in range(11)}
    routed(**batch, task_ids=[4, 5, 5, 6, 0]).logits.sum().backward()
    assert all(p.grad.abs().sum(1).gt(0).all() for n, p in routed.named_parameters() if n in names)
    for wrong in (lambda: routing.mhr_z(routed_model(variant="uniform")), lambda: routing.mhr_z(mode_layer())):
        with pytest.raises(ValueError, match="trains the logits of Poly selectors"):
            wrong()
    with pytest.raises(ValueError, match="at least 1"):
        routing.mhr_z(routed, n_tasks=0)
