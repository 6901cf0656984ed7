"""Equal to PEFT's Poly layer with its own parameters, outputs and every gradient."""

import peft
import pytest
import torch
from routed_problems import PATHS

from linlora import functional
from linlora.testing import relative_error


def poly_layer(k, n, r, tasks, skills, splits, device):
    """A layer of PEFT's Poly in float64 with random factors and logits."""
    holder = torch.nn.ModuleDict({"layer": torch.nn.Linear(k, n)})
    config = peft.PolyConfig(
        r=r, n_tasks=tasks, n_skills=skills, n_splits=splits, target_modules=["layer"], init_weights=False
    )
    layer = peft.get_peft_model(holder, config).base_model.model["layer"].double().to(device)
    torch.nn.init.normal_(layer.poly_router["default"].module_logits)
    return layer


# (K, N, r, tasks, skills, splits, batch, length): PEFT's own test (flan-t5-small, r = 8, 3 tasks, 2 skills, 4 splits),
# its defaults, a private skill a task, and a shared one.
POLY = {
    "peft-test": (512, 384, 8, 3, 2, 4, 12, 9),
    "defaults": (24, 36, 8, 1, 4, 1, 3, 5),
    "many-heads": (24, 36, 3, 6, 5, 12, 20, 3),
    "rank-one-one-skill": (24, 36, 1, 4, 1, 2, 6, 40),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "sampled"])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("config", POLY.values(), ids=POLY)
def test_equals_the_poly_layer_of_peft(path, device, config, name, training):
    path(name)
    k, n, r, tasks, skills, splits, batch, length = config
    layer = poly_layer(k, n, r, tasks, skills, splits, device).train(training)
    A, B = layer.poly_lora_A["default"], layer.poly_lora_B["default"]
    router = layer.poly_router["default"]
    x = torch.randn(batch, length, k, dtype=torch.float64, device=device, requires_grad=True)
    task_ids = torch.arange(batch, device=device) % tasks
    base = layer.base_layer
    torch.manual_seed(1)
    expected = layer(x, task_ids=task_ids)
    torch.manual_seed(1)  # in training PEFT samples the weights of every example
    w = router(task_ids, x) if training else router(torch.arange(tasks, device=device), x)
    y = functional.routed_lora_linear(x, base.weight, base.bias, A, B, w, 1 / r, None if training else task_ids)
    assert relative_error(y, expected) < 1e-12
    g = torch.randn_like(y)
    parameters = [x, A, B, router.module_logits]
    gradients = torch.autograd.grad(expected, parameters, g)
    # a single skill's weight is 1 but for PEFT's 1e-12: the gradient of its logit is nothing beside the others
    nothing = 1e-12 * max(gradient.norm() for gradient in gradients)
    for actual, wanted in zip(torch.autograd.grad(y, parameters, g), gradients, strict=True):
        assert relative_error(actual, wanted) < 1e-11 or (actual - wanted).norm() < nothing
