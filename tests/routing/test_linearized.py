"""Linearized routing: around the mean of the inventory, at both scopes, linear in the weights, and fitted by them."""

import copy

import pytest
import torch
from routed_models import TARGETS, fill, folded, mixed_by_hand, poly_weights, routed_model, rows_of
from scipy.optimize import minimize

import linlora
from linlora import routing
from linlora.testing import relative_error, tiny_base, tiny_batch

SCOPES = ["layer", "model"]


def linearized(scope, architecture="bert", **options):
    routed = routed_model(architecture, **options)
    linlora.linearize(routed, scope)
    return routed


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("architecture", TARGETS)
def test_uniform_routing_is_exactly_the_mean_adapter(architecture, scope, double):
    routed, batch = routed_model(architecture), tiny_batch(architecture, 5)

    def delta_weight(layer):
        uniform = torch.full((4, 3), 1 / 3, dtype=torch.float64)
        A_z, B_z = mixed_by_hand(layer.lora_A, layer.lora_B, uniform)
        return (A_z @ B_z).t()

    mean = folded(routed, delta_weight, lambda: routed(**batch)[0])
    linlora.linearize(routed, scope)
    uniform = torch.full((5, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(routed(**batch, mixture=uniform)[0], mean, rtol=1e-6, atol=1e-10)
    routing.mhr_mu(routed)
    torch.testing.assert_close(routed(**batch)[0], mean, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("architecture", TARGETS)
def test_layer_scope_folds_to_the_formula(architecture, ids):
    """ΔW = s [(B0 + dB_z) A0 + B0 dA_z] with (A0, B0) the mean of the skills and dA_z, dB_z mixed offsets from it."""
    routed, batch = routed_model(architecture), tiny_batch(architecture, 5)
    plain = copy.deepcopy(routed)
    linlora.linearize(routed, "layer")
    y = routed(**batch, task_ids=ids)[0]
    for task in (0, 2, 3):

        def delta_weight(layer, task=task):
            uniform = torch.full((4, 3), 1 / 3, dtype=torch.float64)
            A0, B0 = mixed_by_hand(layer.lora_A, layer.lora_B, uniform)
            A_z, B_z = mixed_by_hand(layer.lora_A, layer.lora_B, poly_weights(layer, task))
            return (A0 @ B_z + (A_z - A0) @ B0).t()

        rows = (ids == task).nonzero().squeeze(1)
        expected = folded(plain, delta_weight, lambda rows=rows: plain(**rows_of(batch, rows))[0])
        torch.testing.assert_close(y[rows], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("architecture", TARGETS)
def test_model_scope_is_the_jvp_of_the_whole_network(architecture, ids, double):
    """F = f(φ0) + J (φ_z − φ0) by torch.func over a PEFT model at the mean, displaced by what the task mixes."""
    routed, batch = routed_model(architecture), tiny_batch(architecture, 5)
    at_mean = routing.collapse(copy.deepcopy(routed))
    names = {
        f"base_model.model.{layer.layer_name}.lora_{kind}.default.weight": (layer, kind)
        for layer in routed.routed_layers
        for kind in "AB"
    }
    parameters = dict(at_mean.named_parameters())
    assert names.keys() <= parameters.keys()
    point = {name: parameters[name].detach() for name in names}

    def network(adapter):
        return torch.func.functional_call(at_mean, adapter, (), batch)[0]

    plain = copy.deepcopy(routed)
    linlora.linearize(routed, "model")
    y = routed(**batch, task_ids=ids)[0]
    by_name = {layer.layer_name: layer for layer in plain.routed_layers}
    for task in (0, 2, 3):
        mixed = {
            name: mixed_by_hand(
                by_name[layer.layer_name].lora_A,
                by_name[layer.layer_name].lora_B,
                poly_weights(by_name[layer.layer_name], task),
            )[kind == "B"].t().detach()
            for name, (layer, kind) in names.items()
        }  # fmt: skip
        offsets = {name: mixed[name] - point[name] for name in names}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            f, tangent = torch.func.jvp(network, (point,), (offsets,))
        rows = ids == task
        assert relative_error(y[rows], (f + tangent)[rows]) < 1e-10


@pytest.mark.parametrize("scope", SCOPES)
def test_every_gradient_of_model_and_layer_scope(scope, ids, double):
    """Against finite differences of the loss: of F at layer scope; at model scope of the F that autograd sees."""
    routed, batch = linearized(scope, target_modules=["query", "dense"]), tiny_batch("bert", 5)
    routed(**batch, task_ids=ids).logits.sin().sum().backward()
    for name, parameter in routed.named_parameters():
        if not parameter.requires_grad:
            continue
        direction, values = torch.randn_like(parameter), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(routed(**batch, task_ids=ids).logits.sin().sum())
                parameter.sub_(direction, alpha=step)
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("scope", SCOPES)
def test_model_scope_is_affine_in_the_weights_and_layer_scope_is_not(scope, batch, double):
    routed = linearized(scope)
    v, w = torch.randn(2, 5, 4, 3, dtype=torch.float64)

    def F(w):
        return routed(**batch, mixture=w).logits

    error = relative_error(F(2.0 * v - 3.0 * w), 2.0 * F(v) - 3.0 * F(w) + 2.0 * F(torch.zeros_like(w)))
    assert error < 1e-10 if scope == "model" else error > 1e-6


def test_fresh_inventories_are_linearized_at_B0_zero(batch, ids):
    for scope in SCOPES:
        base = tiny_base("bert").double()
        expected = base(**batch).logits
        routed = routing.route(base, 4, n_skills=3, n_heads=4, rank=2, target_modules=["query", "value"])
        mean = routing.average(routed.layers[0].lora_A, routed.layers[0].lora_B)[0]
        report = linlora.linearize(routed, scope)
        assert {layer.state for layer in routed.routed_layers} == {"short"}
        assert "B0 = 0: B alone trains" in str(report)
        torch.testing.assert_close(routed.layers[0].A0, mean)
        torch.testing.assert_close(routed(**batch, task_ids=ids).logits, expected)
        assert not any(name.endswith("lora_A") for name, _ in routed.named_parameters())
        routed(**batch, task_ids=ids).logits.sum().backward()
        assert all(p.grad is not None for p in routed.parameters() if p.requires_grad)


def test_changing_the_scope_keeps_what_was_trained(batch, ids):
    routed = linearized("model")
    at_model_scope = routed(**batch, task_ids=ids).logits
    linlora.set_scope(routed, "layer")
    assert routed.report().scope == "layer"
    assert not torch.allclose(routed(**batch, task_ids=ids).logits, at_model_scope)
    linlora.set_scope(routed, "model")
    torch.testing.assert_close(routed(**batch, task_ids=ids).logits, at_model_scope)


@pytest.mark.parametrize("trained", [True, False], ids=["pair", "short"])
@pytest.mark.parametrize("scope", SCOPES)
def test_delinearizing_gives_the_skills_back(scope, trained, batch, ids):
    routed = routed_model()
    if not trained:
        for layer in routed.layers:
            torch.nn.init.zeros_(layer.lora_B)
    expected = routed(**batch, task_ids=ids).logits
    linlora.linearize(routed, scope)
    linlora.delinearize(routed)
    assert {layer.state for layer in routed.routed_layers} == {"plain"}
    torch.testing.assert_close(routed(**batch, task_ids=ids).logits, expected)


def test_a_head_trains_on_top_of_the_linearized_features(batch, ids):
    routed = linearized("model", modules_to_save=["classifier"])
    routed(**batch, task_ids=ids, labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    assert all(p.grad is not None for p in routed.parameters() if p.requires_grad)
    linlora.set_scope(routed, "layer")
    routed(**batch, task_ids=ids)


class TestRefusals:
    def test_linearizing_twice(self):
        with pytest.raises(ValueError, match="is linearized already"):
            linlora.linearize(linearized("layer"))

    def test_a_gate_at_model_scope(self):
        with pytest.raises(ValueError, match=r"weights of layer 'bert.*query' depend on its input.*use scope='layer'"):
            linearized("model", variant="gate")
        linearized("layer", variant="gate")

    def test_other_parameters_that_train(self):
        routed = routed_model()
        routed.model.classifier.requires_grad_(True)
        with pytest.raises(ValueError, match=r"2 other parameters train: model.classifier.weight.*modules_to_save"):
            linlora.linearize(routed, "model")

    def test_a_trained_module_before_the_inventories(self):
        routed = routed_model(modules_to_save=["embeddings"])
        with pytest.raises(ValueError, match=r"'bert.embeddings' is trained as a whole and comes before"):
            linlora.linearize(routed, "model")

    def test_setting_the_scope_of_a_plain_model(self):
        with pytest.raises(ValueError, match="not linearized"):
            linlora.set_scope(routed_model(), "layer")

    def test_unknown_scopes(self):
        with pytest.raises(ValueError, match="unknown scope 'network'"):
            linlora.linearize(routed_model(), "network")


# -- the convex few-shot fit ------------------------------------------------------------------------------------------


def dense_problem(routed, batch):
    """F(0) and the Jacobian of the logits in all weights, column by column; F is affine in them."""
    shapes = {name: (s.sizes.n_heads, s.sizes.n_skills) for name, s in routed.selector_by_name.items()}
    count = sum(heads * skills for heads, skills in shapes.values())

    def F(flat):
        parts = iter(flat.split([heads * skills for heads, skills in shapes.values()]))
        routing.add_task(copied, {name: next(parts).view(shape) for name, shape in shapes.items()})
        last = torch.full((5,), copied.n_tasks - 1)
        return copied(**batch, task_ids=last).logits.detach()

    copied = copy.deepcopy(routed)
    origin = F(torch.zeros(count, dtype=torch.float64))
    J = torch.stack([F(column) - origin for column in torch.eye(count, dtype=torch.float64)], -1)
    return origin, J, shapes


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("simplex", [False, True], ids=["free", "simplex"])
def test_the_fit_is_the_optimum_of_the_convex_problem(loss, simplex, batch, double):
    routed = linearized("model", granularity="block", n_heads=2, scale=0.5)
    routed.model.classifier.weight.data.mul_(20.0)  # so that the weights matter
    logistic = loss == "logistic"
    labels = torch.tensor([0, 1, 2, 0, 1]) if logistic else torch.randn(5, 3, dtype=torch.float64)
    origin, J, shapes = dense_problem(routed, batch)
    ridge = 1e-2

    def objective(flat):
        w = torch.tensor(flat, dtype=torch.float64, requires_grad=True)
        F = origin + J @ w
        data = torch.nn.functional.cross_entropy(F, labels) if logistic else 0.5 * (F - labels).square().sum() / 5
        value = data + 0.5 * ridge * w.square().sum()
        value.backward()
        return value.item(), w.grad.numpy()

    heads = [(start, skills) for start, skills in _heads(shapes)]
    constraints = [{"type": "eq", "fun": lambda w, s=s, n=n: w[s : s + n].sum() - 1.0} for s, n in heads]
    start = torch.cat([torch.full((h * s,), 1.0 / s) for h, s in shapes.values()]).double().numpy()
    options = {"bounds": [(0.0, None)] * len(start), "constraints": constraints} if simplex else {}
    best = minimize(objective, start, jac=True, method="SLSQP" if simplex else "L-BFGS-B", tol=1e-12, **options).fun

    examples = [{**rows_of(batch, part), "labels": labels[part]} for part in (slice(0, 2), slice(2, 5))]
    solution = routing.fit_routing(routed, examples, loss, simplex=simplex, ridge=ridge)
    flat = torch.cat([w.flatten() for w in solution.weights.values()]).numpy()
    assert objective(flat)[0] == pytest.approx(best, rel=1e-6)
    assert best < objective(start)[0] * 0.999
    assert solution.loss < solution.loss_before
    if simplex:
        for w in solution.weights.values():
            assert w.min() >= 0.0
            torch.testing.assert_close(w.sum(-1), torch.ones(2, dtype=w.dtype))
    task = routing.add_task(routed, solution.weights)
    F = routed(**batch, task_ids=torch.full((5,), task)).logits
    torch.testing.assert_close(F, origin + J @ torch.tensor(flat), rtol=1e-6, atol=1e-8)


def _heads(shapes):
    start = 0
    for heads, skills in shapes.values():
        for _ in range(heads):
            yield start, skills
            start += skills


def test_a_new_task_leaves_the_old_ones_as_they_are(batch, ids):
    routed = linearized("model")
    expected = routed(**batch, task_ids=ids).logits
    weights = {name: torch.rand(4, 3) for name in routed.selector_names}
    assert routing.add_task(routed, weights) == 4
    torch.testing.assert_close(routed(**batch, task_ids=ids).logits, expected)
    with pytest.raises(
        ValueError, match=r"add_task: weights \(4, 3\) for the selector 'bert.*' are expected, got none"
    ):
        routing.add_task(routed, {})


def test_a_network_whose_output_is_a_tensor_is_fitted():
    base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    routed = fill(routing.route(base, 2, n_skills=3, rank=2, target_modules=["0"]))
    routed.linearize("model")
    x, labels = torch.randn(9, 6, dtype=torch.float64), torch.randint(3, (9,), dtype=torch.int32)
    solution = routing.fit_routing(routed, [{"input": x, "labels": labels}])
    task = routing.add_task(routed, solution.weights)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(routed(x, task_ids=[task] * 9), labels.long())
    assert float(loss) == pytest.approx(solution.loss)


@pytest.mark.parametrize("values", [float("inf"), float("nan")])
def test_outputs_that_are_not_finite_are_not_fitted(batch, values):
    routed = linearized("model")
    with torch.no_grad():
        routed.model.get_submodule("classifier").bias.fill_(values)
    with pytest.raises(ValueError, match="fit_routing: the model's outputs are not finite"):
        routing.fit_routing(routed, [{**batch, "labels": torch.zeros(5, dtype=torch.long)}])


@pytest.mark.parametrize("label", [-100, 3])
def test_class_indices_that_no_output_has_are_refused(batch, label):
    labels = torch.tensor([0, 1, 2, 0, label])
    with pytest.raises(ValueError, match="fit_routing: class indices are 0 to 2, got"):
        routing.fit_routing(linearized("model"), [{**batch, "labels": labels}])


def test_what_cannot_be_fitted_is_refused(batch):
    examples = [{**batch, "labels": torch.zeros(5, dtype=torch.long)}]
    with pytest.raises(ValueError, match="affine in the weights of its skills at model scope alone"):
        routing.fit_routing(linearized("layer"), examples)
    with pytest.raises(ValueError, match="leave their task_ids out"):
        routing.fit_routing(linearized("model"), [{**examples[0], "task_ids": torch.zeros(5)}])
    routed = linearized("model")
    selectors = list(routed.selectors)
    with pytest.raises(ValueError, match="non-empty"):
        routing.fit_routing(routed, [])
    assert all(a is b for a, b in zip(selectors, routed.selectors, strict=True))  # as it was
