"""Checks the examples that a network, linearized as a whole, is fitted to by a convex loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

LOSSES = ("squared", "logistic")


def check_examples(action: str, batches: Sequence[Mapping[str, Any]], loss: str, ridge: float) -> None:
    """Raise a ValueError, by the name of what is done, for no batches, no labels, an unknown loss or no ridge."""
    if loss not in LOSSES:
        raise ValueError(f"{action}: unknown loss {loss!r}; choose 'squared' or 'logistic'")
    if not len(batches) or any("labels" not in batch for batch in batches):
        raise ValueError(f"{action}: batches is a non-empty sequence of inputs that have 'labels'")
    if not ridge > 0.0:
        raise ValueError(f"{action}: ridge is positive, got {ridge}")


def check_labels(action: str, outputs: Tensor, labels: Tensor, loss: str) -> None:
    """Raise a ValueError unless outputs are finite and have such labels.

    Squared loss takes floats shaped like the outputs, logistic loss a class index for every row of (rows, classes).
    """
    squared = loss == "squared"
    expected = outputs.shape if squared else outputs.shape[:1]
    if labels.shape != expected or labels.is_floating_point() != squared:
        kind = "floats" if squared else "class indices"
        raise ValueError(
            f"{action}: {loss} loss takes labels, {kind} {tuple(expected)} are expected for outputs "
            f"{tuple(outputs.shape)}, got {labels.dtype} {tuple(labels.shape)}"
        )
    classes = outputs.shape[-1]
    if not squared and not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"{action}: class indices are 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    if not outputs.isfinite().all():
        raise ValueError(f"{action}: the model's outputs are not finite where its adapter is now")
