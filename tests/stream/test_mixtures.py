"""Mixtures of experts are exact by torch.func.jvp, whichever implementation transformers runs their experts by."""

from functools import cache

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import linlora
from linlora.testing import randomize

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 16, "vocab_size": 32, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
FAMILIES = {
    "Olmoe": {"num_experts": 4},
    "Mixtral": {"num_local_experts": 4, "head_dim": 8},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "DeepseekV3": {
        "n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        **LATENT,
    },
}  # fmt: skip
TOKENS = torch.arange(3, 13).view(2, 5)


def mixture(family, implementation):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    options = {} if implementation == "default" else {"experts_implementation": implementation}
    base = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager", **options)
    with torch.no_grad():
        for parameter in base.parameters():  # some are made without a value
            nn.init.normal_(parameter, std=0.3)
    model = get_peft_model(base.eval(), LoraConfig(r=2, target_modules=["o_proj"]))
    randomize(model, 1)
    return model if implementation == "default" else model.double()  # grouped_mm takes no float64


def linearized(family, implementation):
    model = mixture(family, implementation)
    linlora.linearize(model, scope="model")
    randomize(model, 2, ("lora_dA", "lora_dB"))
    return model


@cache
def expected(family):
    """F and its gradients by forward mode over the plain model, whose eager experts it can differentiate."""
    plain, model = mixture(family, "eager"), linearized(family, "eager")
    point = {name: p.detach() for name, p in plain.named_parameters() if "lora_" in name}
    names = {name: name.replace(".lora_", ".lora_d").replace(".weight", "") for name in point}
    delta = {name: model.get_parameter(names[name]).detach().clone().requires_grad_() for name in point}

    def logits(p):
        return torch.func.functional_call(plain, p, kwargs={"input_ids": TOKENS}).logits

    f, tangent = torch.func.jvp(logits, (point,), (delta,))
    gradients = torch.autograd.grad((f + tangent).sin().sum(), list(delta.values()))
    return (f + tangent).detach(), f, dict(zip((names[name] for name in delta), gradients, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("implementation", ["default", "eager", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_experts_is_exact(family, implementation):
    model = linearized(family, implementation)
    F, f, gradients = expected(family)
    y = model(input_ids=TOKENS).logits
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}  # of transformers' norms, in float32
    assert (F - f).abs().max() > 1e3 * close["atol"]
    torch.testing.assert_close(y.detach(), F, **close)
    actual = torch.autograd.grad(y.sin().sum(), [model.get_parameter(name) for name in gradients])
    scale = max(g.abs().max() for g in gradients.values())
    for a, b in zip(actual, gradients.values(), strict=True):
        assert (a - b).abs().max() <= 1e-5 * scale
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, y.detach(), **close)
