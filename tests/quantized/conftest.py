"""Quantized tiny Llamas, and the same models with the weights that the quantized ones stand for."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from linlora.testing import randomize

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def base():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64, pad_token_id=0, attention_bias=True)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def linears(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]


def torchao(bits):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    configs = {
        8: quantization.Int8WeightOnlyConfig(),
        4: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
    }
    model = base()
    chosen = {id(module) for _, module in linears(model)}
    quantization.quantize_(model, configs[bits], filter_fn=lambda module, _: id(module) in chosen)
    stands_for = base()
    for (_, module), (_, plain) in zip(linears(model), linears(stands_for), strict=True):
        plain.weight.data = module.weight.dequantize()
    return model, stands_for


def bitsandbytes(bits, folder):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    options = {
        8: {"load_in_8bit": True},
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    }
    base().save_pretrained(folder)
    quantization = BitsAndBytesConfig(**options[bits])
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu").eval()
    stands_for = base()
    for (_, module), (_, plain) in zip(linears(model), linears(stands_for), strict=True):
        weight = module.weight
        if bits == 8:
            plain.weight.data = weight.data.float() * weight.SCB[:, None] / 127.0
        else:
            plain.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).clone()
    return model, stands_for


KINDS = {
    "torchao-int8": lambda _: torchao(8),
    "torchao-int4": lambda _: torchao(4),
    "bitsandbytes-int8": lambda folder: bitsandbytes(8, folder),
    "bitsandbytes-nf4": lambda folder: bitsandbytes(4, folder),
}
TOLERANCE = {  # what the forward of the base itself rounds: activations to int8, weights packed for the CPU
    "bitsandbytes-int8": 5e-2,
    "bitsandbytes-nf4": 5e-3,
}


@pytest.fixture(scope="session", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def bases(kind, tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KINDS[kind](tmp_path_factory.mktemp(kind))


@pytest.fixture
def tolerance(kind):
    return TOLERANCE.get(kind, 1e-4)


@pytest.fixture
def pair(bases):
    """A PEFT model over the quantized base, and one over what it stands for, with equal adapters."""

    def make(trained=True, **options):
        models = []
        for model in bases:
            config = LoraConfig(
                **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
            )
            models.append(get_peft_model(copy.deepcopy(model), config).eval())
            randomize(models[-1], 1, ("lora_A", "lora_B") if trained else ("lora_A",))
        return models

    return make
