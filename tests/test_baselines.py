"""The baseline of model scope, `torch.func.jvp` over a whole model, is the same function as linlora's."""

from __future__ import annotations

import re

import pytest
import torch

import linlora
from linlora.baselines import FunctorchModel
from linlora.testing import tiny_batch, tiny_model


def _moved(model, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Move the adapter by the same random step in either parametrization; returns what moved, by layer and factor."""
    generator, moved = torch.Generator().manual_seed(5), {}
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in kinds if f".{kind}." in name), None)
        if kind is not None:
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            with torch.no_grad():
                parameter.add_(step, alpha=0.1)
            layer = re.split(r"\.(?:of_)?lora_", name.split("base_model.model.")[1])[0]
            moved[f"{layer} {kind[-1]}"] = parameter
    return moved


@pytest.mark.parametrize("trained", [False, True], ids=["B0=0", "B0!=0"])
def test_the_whole_model_by_jvp_equals_model_scope_in_outputs_and_gradients(trained: bool) -> None:
    ours, oracle = (tiny_model("bert", trained).double() for _ in range(2))
    functorch = FunctorchModel(oracle)
    linlora.linearize(ours, scope="model")
    ours_moved = _moved(ours, ("lora_dA", "lora_dB") if trained else ("lora_B",))
    functorch_moved = _moved(functorch, ("lora_A", "lora_B") if trained else ("lora_B",))
    batch, labels = tiny_batch("bert"), torch.tensor([0, 1, 2])

    logits, expected = ours(**batch).logits, functorch(**batch)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected, oracle(**batch).logits, rtol=1e-3)  # not the bilinear network

    for output in (logits, expected):
        torch.nn.functional.cross_entropy(output, labels).backward()
    assert ours_moved.keys() == functorch_moved.keys()
    for name, parameter in functorch_moved.items():
        assert parameter.grad.any()
        torch.testing.assert_close(ours_moved[name].grad, parameter.grad, rtol=1e-10, atol=1e-12)


def test_labels_are_refused_because_the_loss_would_be_linearized() -> None:
    with pytest.raises(ValueError, match="leave the labels out"):
        FunctorchModel(tiny_model("bert"))(**tiny_batch("bert"), labels=torch.tensor([0, 1, 2]))
