"""The logits of a model that holds a fused vector, called without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Logits = Callable[[Any, Any], Tensor]


def main_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """`model(**batch)[0]`: the logits of a transformers model called without labels, of F at model scope.

    A model with one head a task has its own function of (model, batch) instead.

    >>> from linlora.testing import tiny_batch, tiny_model
    >>> main_logits(tiny_model("bert"), tiny_batch("bert")).shape
    torch.Size([3, 3])
    """
    return model(**batch)[0]
