"""Tiny transformers models with random weights and LoRA adapters, for tests, doctests and trying things out."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

ARCHITECTURES = (
    "bert", "roberta", "vit", "clip_vision", "clip_text", "t5", "flan_t5", "llama", "qwen2", "gpt2",
)  # fmt: skip

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 1}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", {**_SIZES, "num_labels": 3}),
    "roberta": (
        "RobertaConfig",
        "RobertaForSequenceClassification",
        {**_SIZES, "num_labels": 3, "max_position_embeddings": 32},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", {**_SIZES, **_IMAGES, "num_labels": 3}),
    "clip_vision": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", {**_SIZES, **_IMAGES, "projection_dim": 16}),
    "clip_text": (
        "CLIPTextConfig",
        "CLIPTextModelWithProjection",
        {**_SIZES, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 63},
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "flan_t5": ("T5Config", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 32,
            "bos_token_id": 0, "eos_token_id": 0,
        },
    ),
}  # fmt: skip
_TARGETS = {
    "bert": ["query", "value", "dense"],
    "roberta": ["query", "value", "dense"],
    "clip_vision": ["q_proj", "v_proj", "fc1"],
    "clip_text": ["q_proj", "v_proj", "fc2"],
    "t5": ["q", "v", "wi"],
    "flan_t5": ["q", "v", "wi_0", "wo"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


def tiny_base(architecture: str, seed: int = 0, **config_options: Any) -> nn.Module:
    """A base model of hidden size 32 and two layers, in eval mode."""
    if architecture not in _BASES:
        raise ValueError(f"unknown architecture {architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
    torch.manual_seed(seed)
    config_name, model_name, options = _BASES[architecture]
    if architecture not in ("vit", "clip_vision"):
        options = {"vocab_size": 64, **options}
    config = getattr(transformers, config_name)(**{**options, **config_options})
    return getattr(transformers, model_name)(config).eval()


def tiny_model(architecture: str = "bert", trained: bool = False, seed: int = 0, **lora_options: Any) -> PeftModel:
    """A tiny PEFT model; with `trained` its adapter is random instead of starting at B = 0."""
    base = tiny_base(architecture, seed)
    targets = _TARGETS.get(architecture) or sorted(  # ViT's are named differently from one transformers to the next
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
    """Inputs for `tiny_base(architecture)`; `model(**batch)[0]` is the main output."""
    generator = torch.Generator().manual_seed(seed)
    if architecture in ("vit", "clip_vision"):
        return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator)}
    tokens = torch.randint(1, 64, (rows, 7), generator=generator)
    if architecture in ("t5", "flan_t5"):
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; infinite where actual holds NaN, absolute where expected is 0."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if actual.isnan().any():
        return float("inf")
    norm = expected.norm()
    return float((actual - expected).norm() / norm) if norm > 0 else float(actual.norm())
