"""The pre-trained backbone: a ViT of 534,656 parameters, an ordinary transformers checkpoint inside the package.

`python -m linlora.quickstart.glyphs.pretrain` made it. Its hash is checked whenever it is read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from linlora.training.checkpoints import quiet

FOLDER = Path(__file__).with_name("data")
SHA256 = "fc3446653fe9bbb0e863f25b20c8bd4bbde2aff3f5a75f4971ae21df003c76f9"
"""Of model.safetensors."""

WIDTH = 128
SCALE = 16.0
"""The factor of the cosines, in pre-training and in the heads."""


def new_backbone() -> ViTModel:
    """The architecture with fresh weights: images (n, 1, 16, 16) from -1 to 1, 17 tokens of `WIDTH`, 4 layers."""
    config = ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, initializer_range=0.09, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return ViTModel(config, add_pooling_layer=False)


def pooled(tokens: Tensor) -> Tensor:
    """The mean token: (n, tokens, WIDTH) to (n, WIDTH)."""
    return tokens.mean(1)


def backbone(folder: Path = FOLDER, sha256: str = SHA256) -> ViTModel:
    """The pre-trained backbone in fp32, frozen, in evaluation mode.

    Args:
        folder: of config.json and model.safetensors, which holds fp16.
        sha256: the hash that model.safetensors must have.

    Raises:
        ValueError: the file has another hash.

    >>> sum(parameter.numel() for parameter in backbone().parameters())
    534656
    """
    file = folder / "model.safetensors"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{file} has SHA-256 {found} instead of {sha256}: it is damaged; install linlora again")
    with quiet():
        model = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    return model.eval().requires_grad_(False)
