"""The surroundings of an experiment in every process: kernels, threads, silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

import linlora
from linlora.training.checkpoints import quiet


@contextmanager
def surroundings(device: str = "cpu", threads: int | None = None) -> Iterator[None]:
    """Compute on a device with some threads (as many as there are for None), without the chatter of other libraries.

    On a GPU the kernels are asked for by name, so that the run is of the kernels or an error, never a fallback.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with linlora.use_backend("triton") if device.startswith("cuda") else nullcontext(), quiet():
            yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str) -> None:
    """Raise a ValueError for a device that this machine does not have."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"unknown device {device!r}: choose 'cpu' or 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device '{device}' is not available: this torch ({torch.__version__}) sees no CUDA GPU. Run with "
            "--device cpu, or install a CUDA build of torch on a machine with an NVIDIA GPU"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device '{device}' is not available: there are {torch.cuda.device_count()} GPUs, from cuda:0")
