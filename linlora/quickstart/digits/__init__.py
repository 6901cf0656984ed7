"""Handwritten digits in changed domains: tasks for experiments, on a backbone that is pre-trained when it is needed."""

from linlora.quickstart.digits.backbone import Digits

__all__ = ["Digits"]
