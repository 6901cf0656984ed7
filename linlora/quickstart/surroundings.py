"""What holds while the quickstart computes, in every process of it: the kernels, the threads, no noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers.utils import logging

import linlora


@contextmanager
def surroundings(device: str, threads: int) -> Iterator[None]:
    with _kernels(device), _threads(threads), _quiet_transformers():
        yield


def _kernels(device: str) -> AbstractContextManager[None]:
    """On a GPU the kernels are asked for by name, so that the run is of the kernels or an error, never a fallback."""
    return linlora.use_backend("triton") if device.startswith("cuda") else nullcontext()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Our bar is the only one: a tiny backbone needs none to be saved, nor warnings for library authors."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
