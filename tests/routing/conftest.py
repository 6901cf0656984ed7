"""Tasks and inputs of a batch of five."""

import sys
from pathlib import Path

import pytest
import torch

from linlora.testing import tiny_batch

sys.path.insert(0, str(Path(__file__).parent))  # routed_models


@pytest.fixture
def ids():
    return torch.tensor([2, 0, 2, 3, 0])


@pytest.fixture
def batch():
    return tiny_batch("bert", 5)
