"""The independent oracles: torch.func.jvp over PEFT's own layers, one layer and whole models, in float64."""

import pytest
import torch

import linlora
from linlora.baselines import FunctorchLoraLinear, linearize_with_functorch
from linlora.testing import ARCHITECTURES, randomize, tiny_batch, tiny_model


def delta_parameters(model, kinds):
    return {n: p for n, p in model.named_parameters() if any(f".{kind}." in n for kind in kinds)}


@pytest.mark.parametrize("over", ["all", "adapter"])
@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
def test_one_layer_equals_jvp_over_the_peft_layer(trained, over):
    ours, oracle = (tiny_model("llama", trained).double() for _ in range(2))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    linlora.linearize(ours)
    layer, functorch = ours.get_submodule(name), FunctorchLoraLinear(oracle.get_submodule(name), over)
    dA, dB = torch.randn(4, 32).double(), torch.randn(32, 4).double()
    reference = functorch.layer
    with torch.no_grad():
        reference.lora_A.default.weight += dA if trained else 0.0
        reference.lora_B.default.weight += dB
        if trained:
            layer.lora_dA["default"].copy_(dA)
            layer.lora_dB["default"].copy_(dB)
        else:
            layer.lora_B.default.weight.copy_(dB)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, 32, dtype=torch.float64)
    dB_ours = layer.lora_dB["default"] if trained else layer.lora_B.default.weight
    y, y_oracle = layer(x), functorch(x)
    torch.testing.assert_close(y, y_oracle, rtol=1e-12, atol=1e-12)
    ours_gradients = torch.autograd.grad(y, [x, dB_ours] + ([layer.lora_dA["default"]] if trained else []), g)
    oracle_parameters = [x, reference.lora_B.default.weight, reference.lora_A.default.weight]
    oracle_gradients = torch.autograd.grad(y_oracle, oracle_parameters, g)
    for actual, expected in zip(ours_gradients, oracle_gradients, strict=False):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if not trained:
        assert not oracle_gradients[2].any()  # with B0 = 0, dA has no effect and no gradient


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_models_equal_jvp_in_every_layer(architecture, trained):
    ours, oracle = (tiny_model(architecture, trained).double() for _ in range(2))
    linlora.linearize(ours)
    linearize_with_functorch(oracle)
    if trained:
        start = {name: parameter.clone() for name, parameter in oracle.named_parameters()}
        randomize(ours, 5, ("lora_dA", "lora_dB"))
        with torch.no_grad():
            for name, parameter in delta_parameters(oracle, ["lora_A", "lora_B"]).items():
                delta = name.replace(".layer.lora_", ".lora_d").replace(".weight", "")
                parameter.copy_(start[name] + ours.get_parameter(delta))
    else:
        randomize(ours, 5, ("lora_B",))
        randomize(oracle, 5, ("lora_B",))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(architecture).items()}
    outputs = [model(**batch)[0] for model in (ours, oracle)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for logits in outputs:
        (logits.sin() * torch.linspace(0, 1, logits.numel()).view_as(logits)).sum().backward()
    compared = 0
    for name, parameter in delta_parameters(oracle, ["lora_A", "lora_B"]).items():
        if trained:
            ours_name = name.replace(".layer.lora_", ".lora_d").replace(".weight", "")
        elif "lora_A" in name:
            assert not parameter.grad.any()
            continue
        else:
            ours_name = name.replace(".layer.lora_", ".lora_")
        torch.testing.assert_close(ours.get_parameter(ours_name).grad, parameter.grad, rtol=1e-10, atol=1e-10)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_accelerated_plain_lora_equals_peft(backend, device):
    ours, peft = (tiny_model("bert", trained=True).to(device) for _ in range(2))
    batch = {name: tensor.to(device) for name, tensor in tiny_batch("bert").items()}
    linlora.accelerate(ours)
    with linlora.use_backend(backend):
        loss = ours(**batch).logits.sin().sum()
        loss.backward()
    expected = peft(**batch).logits.sin().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    compared = 0
    for (name, parameter), other in zip(ours.named_parameters(), peft.parameters(), strict=True):
        if "lora_" in name:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == 22
