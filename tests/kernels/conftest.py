"""Kernel tests: freshly allocated memory is poisoned. The root conftest decides between GPU and interpreter."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # kernel_oracles


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an element a kernel forgets to write fails its test."""
    new_empty = torch.Tensor.new_empty

    def new_poisoned(self: torch.Tensor, *size: object, **options: object) -> torch.Tensor:
        tensor = new_empty(self, *size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", new_poisoned)
