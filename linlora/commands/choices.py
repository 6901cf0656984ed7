"""The choices that flags of `linlora train` offer, in words."""

from __future__ import annotations

from linlora.training.settings import ENDS, HEADS, KINDS, METHODS

TRAINING_METHODS = ", ".join(METHODS)
TASK_KINDS = ", ".join(KINDS)
CLASSIFIER_HEADS = ", ".join(HEADS)
LINEAR_ENDS = ", ".join(ENDS)
