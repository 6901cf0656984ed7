"""The shapes that are measured: linear layers of real models, and whole models with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerShape:
    """A linear layer of a model."""

    K: int
    N: int
    bias: bool = False


LAYERS: dict[str, dict[str, LayerShape]] = {
    "clip-vit-b16": {
        "q": LayerShape(768, 768, True),
        "fc1": LayerShape(768, 3072, True),
        "fc2": LayerShape(3072, 768, True),
    },
    "flan-t5-base": {"q": LayerShape(768, 768), "wi": LayerShape(768, 2048), "wo": LayerShape(2048, 768)},
    "flan-t5-large": {"q": LayerShape(1024, 1024)},
    "flan-t5-xl": {"q": LayerShape(2048, 2048), "wi": LayerShape(2048, 5120), "wo": LayerShape(5120, 2048)},
    "llama-3-8b": {
        "q": LayerShape(4096, 4096),
        "k": LayerShape(4096, 1024),
        "up": LayerShape(4096, 14336),
        "down": LayerShape(14336, 4096),
    },
    "qwen-2.5-7b": {
        "q": LayerShape(3584, 3584, True),
        "k": LayerShape(3584, 512, True),
        "up": LayerShape(3584, 18944),
        "down": LayerShape(18944, 3584),
    },
    "tiny": {"linear": LayerShape(8, 8)},  # nothing but the cost of a call
}


@dataclass(frozen=True)
class ModelSpec:
    """An architecture, its size and its batch. A "llama" has four heads of queries to one of keys and values."""

    architecture: Literal["bert", "vit", "llama"]
    layers: int
    hidden: int
    batch: int
    tokens: int
    head_size: int = 64

    @property
    def heads(self) -> int:
        return max(self.hidden // self.head_size, 1)


MODELS = {
    "bert-2x32": ModelSpec("bert", 2, 32, 2, 8),
    "llama-1x64": ModelSpec("llama", 1, 64, 2, 8, head_size=16),
    "bert-4x256": ModelSpec("bert", 4, 256, 16, 64),
    "vit-4x256": ModelSpec("vit", 4, 256, 16, 65),
    "bert-6x384": ModelSpec("bert", 6, 384, 16, 128),
    "llama-2x512": ModelSpec("llama", 2, 512, 1, 512),
    "bert-12x768": ModelSpec("bert", 12, 768, 32, 128),
    "vit-12x768": ModelSpec("vit", 12, 768, 32, 197),
    "llama-1x4096": ModelSpec("llama", 1, 4096, 1, 4096, head_size=128),
}
