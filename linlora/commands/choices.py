"""The choices that flags of `linlora train` offer, in words."""

from __future__ import annotations

from linlora.training.settings import ENDS, FAMILIES, HEADS, KINDS

TRAINING_METHODS = ", ".join(FAMILIES)
TASK_KINDS = ", ".join(KINDS)
CLASSIFIER_HEADS = ", ".join(HEADS)
LINEAR_ENDS = ", ".join(ENDS)
