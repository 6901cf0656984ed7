"""Names the selector that a layer reads: its own, its block's or the model's."""

from __future__ import annotations

GRANULARITIES = ("layer", "block", "model")


def selector_of(layer_name: str, granularity: str) -> str:
    """The name of the selector of a layer: its own, that of its transformer block, or that of the model ('').

    The first number in a name counts the blocks. A layer outside of all blocks has a selector of its own.

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
