"""The cases of the performance programme: every shape and rank of the layers, the most telling first."""

from __future__ import annotations

from dataclasses import replace

from .cases import Case, Phase, dual_case, layer_case

_RANKS = (4, 16, 64, 128)
_SMALL_ROWS = (1, 2, 4, 8, 16, 32, 64)
_MAIN = ("llama-3-8b", "q", 8192)
_PHASES: tuple[Phase, ...] = ("forward", "input_gradient", "forward_backward")
_SMALL_LAYERS = (("llama-3-8b", "q"), ("llama-3-8b", "down"), ("qwen-2.5-7b", "k"), ("flan-t5-xl", "wi"))
_LAYERS = (
    ("llama-3-8b", "k", 8192), ("llama-3-8b", "up", 8192), ("llama-3-8b", "down", 8192), ("qwen-2.5-7b", "q", 8192),
    ("qwen-2.5-7b", "up", 8192), ("qwen-2.5-7b", "down", 4096), ("flan-t5-xl", "q", 4096), ("flan-t5-xl", "wi", 4096),
    ("clip-vit-b16", "q", 12608), ("clip-vit-b16", "fc1", 12608), ("flan-t5-base", "wi", 2048),
    ("llama-3-8b", "q", 512), ("llama-3-8b", "q", 128), ("qwen-2.5-7b", "k", 512),
)  # fmt: skip


def programme() -> list[Case]:
    """The shapes of the goals first, then small M, dropout, and shape after shape at every rank."""
    goals = [case for rank in _RANKS for case in _forms(_MAIN, rank, _PHASES)]
    small = [
        case
        for layer in _SMALL_LAYERS
        for M in _SMALL_ROWS
        for case in (layer_case(*layer, M, "short", "forward"), layer_case(*layer, M, "pair", "forward"))
    ]
    small += [dual_case(*layer, M, "forward") for layer in _SMALL_LAYERS[:1] for M in _SMALL_ROWS]
    rest = [case for layer in _LAYERS for rank in _RANKS for case in _forms(layer, rank, _PHASES[:2])]
    dropped = [
        replace(case, dropout=0.1)
        for layer in (_MAIN, ("llama-3-8b", "q", 512), ("llama-3-8b", "q", 16))
        for case in _forms(layer, 16, ("forward_backward",))
    ]
    return list(dict.fromkeys([*goals, *small, *dropped, *rest]))


def _forms(layer: tuple[str, str, int], rank: int, phases: tuple[Phase, ...]) -> list[Case]:
    """The layer at B0 = 0, at B0 ≠ 0 and with two streams."""
    return [
        case
        for phase in phases
        for case in (
            layer_case(*layer, "short", phase, rank),
            layer_case(*layer, "pair", phase, rank),
            layer_case(*layer, "pair", phase, rank, op="lora_linear"),
        )
    ]
