"""Everything runs on the GPU where there is one; elsewhere Triton's kernels run in its interpreter, on the CPU."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; each would take all of them
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms, softmax and some losses in float32, whatever the model; here that means float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
