"""Tests of routing's ops; the folder's helpers can be imported by name."""

import sys
from pathlib import Path

import pytest

from linlora.ops import composed

sys.path.insert(0, str(Path(__file__).parent))  # routed_problems


@pytest.fixture
def path(monkeypatch):
    """path("grouped" or "activations") forces that form of `routed_lora_linear`, whatever it costs."""

    def force(name):
        monkeypatch.setattr(composed, "SMALL", 2**62 if name == "activations" else 0)
        if name == "grouped":
            monkeypatch.setattr("linlora.ops.routed_lora_linear.activations_pay", lambda *_, **__: False)

    return force
