"""Tiny transformers models with random weights and LoRA adapters, for tests, doctests and trying things out."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

ARCHITECTURES = ("bert", "vit", "t5", "llama", "gpt2")

_TARGETS = {
    "bert": ["query", "value", "dense"],
    "vit": [],  # named differently from one transformers version to the next: see tiny_model
    "t5": ["q", "v", "wi"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


def tiny_base(architecture: str, seed: int = 0) -> nn.Module:
    """A base model of hidden size 32 and two layers, in eval mode."""
    torch.manual_seed(seed)
    if architecture == "bert":
        config = transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=3,
        )
        model: nn.Module = transformers.BertForSequenceClassification(config)
    elif architecture == "vit":
        config = transformers.ViTConfig(
            image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, num_labels=3,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
    elif architecture == "t5":
        config = transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    elif architecture == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    elif architecture == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=32)
        model = transformers.GPT2LMHeadModel(config)
    else:
        raise ValueError(f"unknown architecture {architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
    return model.eval()


def tiny_model(architecture: str = "bert", trained: bool = False, seed: int = 0, **lora_options: Any) -> PeftModel:
    """A tiny PEFT model; with `trained` its adapter is random instead of starting at B = 0."""
    base = tiny_base(architecture, seed)
    targets = _TARGETS[architecture] or sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and ".layer" in name
        }
    )
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "fan_in_fan_out": architecture == "gpt2"}
    model = get_peft_model(base, LoraConfig(**{**options, **lora_options}))
    if trained:
        randomize(model, seed + 1)
    return model.eval()


def randomize(
    model: nn.Module, seed: int = 1, kinds: tuple[str, ...] = ("lora_A", "lora_B"), scale: float = 0.2
) -> None:
    """Fill the adapter parameters of the given kinds with normal noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{kind}." in name for kind in kinds):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * noise)


def tiny_batch(architecture: str, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Inputs for `tiny_base(architecture)`."""
    generator = torch.Generator().manual_seed(seed)
    if architecture == "vit":
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator)}
    tokens = torch.randint(1, 64, (rows, 7), generator=generator)
    return {"input_ids": tokens, "decoder_input_ids": tokens} if architecture == "t5" else {"input_ids": tokens}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; infinite where actual holds NaN, absolute where expected is 0."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if actual.isnan().any():
        return float("inf")
    norm = expected.norm()
    return float((actual - expected).norm() / norm) if norm > 0 else float(actual.norm())
