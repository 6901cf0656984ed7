"""Which code runs an op: `torch` (composed aten calls, everywhere), `triton` (one launch an op) or `cuda` (csrc/).

Left alone, linlora runs the fastest backend that is *proven* for the call at hand: a kernel is chosen by itself only
where `bench/results/` holds a run on that architecture, in that class of shapes, dtype and dropout or none, whose
correctness checks are green and whose time beats composed torch (`linlora.ops.evidence`). Anything else has to be asked
for by name, and a name that cannot be honoured is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

import torch

import linlora.kernels as kernels
from linlora.kernels.problem import LoraLinear
from linlora.ops import aten, choice, cuda, evidence
from linlora.ops.evidence import ShapeClass, shape_class

BackendName = Literal["torch", "triton", "cuda"]
OPS = (
    "linearized_lora_linear", "lora_linear", "routed_lora_linear", "factor_gradients",
    "linear", "attention", "layer_norm", "rms_norm", "activation", "gated_activation",
)  # fmt: skip
LAYER_OPS = ("linearized_lora_linear", "lora_linear")
"""The ops whose backend depends on the call: its class of shapes, its dtype, its rank, dropout or none."""

_MODULES: dict[str, ModuleType] = {"torch": aten, "triton": kernels, "cuda": cuda}


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run here; the message says why and what to do."""


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Run every linlora op inside the block on one backend; "cuda" has the ops it has no kernel of from "triton".

    Raises ValueError for a name that does not exist and BackendUnavailableError where the backend cannot run at all.
    A call that the backend does not serve (dropout or float32 on "cuda") raises BackendUnavailableError too.
    The choice is that of the thread, or asyncio task, that is in the block; one started inside of it as a task has it
    too, a new thread has none. The backward of an op runs on the backend of its forward, whichever thread runs it.

    >>> import linlora
    >>> with linlora.use_backend("torch"):
    ...     print(linlora.explain(device="cpu").backend)
    torch
    """
    if name not in _MODULES:
        raise ValueError(f"unknown backend {name!r}: choose 'torch', 'triton' or 'cuda'")
    reason = unavailable(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reason}")
    with choice.made(name):
        yield


def select(
    device: torch.device,
    op: str,
    shape: ShapeClass = "any",
    dtype: torch.dtype | None = None,
    rank: int = 0,
    dropout: bool = False,
) -> ModuleType:
    """The module whose `op` runs for tensors on `device`: the one asked for, else the proven one."""
    name = choice.name()
    if name is None:
        return _MODULES[automatic(device.type, device.index, op, shape, dtype, rank, dropout)]
    if not torch.compiler.is_compiling():
        obstacles = choice.obstacles()
        if device not in obstacles:
            obstacles[device] = unavailable(name, device)
        reason = obstacles[device] or refusal(name, op, dtype, rank, dropout)
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot run {op} on {device}: {reason}")
    return _MODULES[name]


def select_layer(problem: LoraLinear) -> ModuleType:
    """The module whose `lora_linear` runs for a problem, whose x is (..., K)."""
    x = problem.x
    if choice.name() is None and not x.is_cuda:
        return aten
    n, k = problem.weight.shape
    shape = shape_class(x.numel() // max(k, 1), n)
    return select(x.device, problem.op, shape, x.dtype, problem.rank, problem.dropout_p > 0.0)


@torch.compiler.assume_constant_result
def automatic(
    device_type: str,
    device_index: int | None,
    op: str,
    shape: ShapeClass = "any",
    dtype: torch.dtype | None = None,
    rank: int = 0,
    dropout: bool = False,
) -> str:
    """The backend that runs when none was asked for: the fastest of those proven for such a call, else 'torch'."""
    return "torch" if device_type != "cuda" else _fastest(device_type, device_index, op, shape, dtype, rank, dropout)


@functools.cache
def _fastest(
    device_type: str,
    device_index: int | None,
    op: str,
    shape: ShapeClass,
    dtype: torch.dtype | None,
    rank: int,
    dropout: bool,
) -> str:
    device = torch.device(device_type if device_index is None else f"{device_type}:{device_index}")
    for entry in evidence.known(op, architecture(device_type, device_index), shape, dtype, dropout):
        if entry.proves and rank <= entry.max_rank and unavailable(entry.backend, device) is None:
            return entry.backend
    return "torch"


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, with the remedy; None when it can."""
    if name == "cuda":
        return cuda.availability(device)
    return kernels.availability(device) if name == "triton" else None


def refusal(name: str, op: str, dtype: torch.dtype | None, rank: int, dropout: bool) -> str | None:
    """Why a backend that is there does not serve a call, with the remedy; None when it does."""
    return cuda.refusal(dtype, rank, dropout) if name == "cuda" and op in cuda.OPS else None


@functools.cache
def architecture(device_type: str, device_index: int | None = None) -> str:
    """The name evidence is filed under: 'sm_90' for an H100 or H200, 'cpu' for a CPU."""
    if device_type != "cuda":
        return device_type
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}"
