"""Selectors for a layer, a block or the model: the name of the one that a layer reads."""

from __future__ import annotations

GRANULARITIES = ("layer", "block", "model")


def selector_of(layer_name: str, granularity: str) -> str:
    """The name of the selector of a layer: its own, that of its transformer block, or that of the model ('').

    A block is what the first number in a name counts. A layer outside of all blocks has a selector of its own.

    >>> selector_of("encoder.block.3.layer.0.SelfAttention.q", "block")
    'encoder.block.3'
    >>> selector_of("bert.pooler.dense", "block"), selector_of("bert.pooler.dense", "model")
    ('bert.pooler.dense', '')
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity {granularity!r}: choose one of {', '.join(GRANULARITIES)}")
    if granularity == "model":
        return ""
    parts = layer_name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if granularity == "block" and numbers else layer_name
