"""Which code runs an op: `torch` (composed aten calls, everywhere), `triton` (one launch an op) or `cuda`.

Left alone, linlora runs the fastest backend that is *proven* on the kind of GPU at hand: a kernel is chosen by itself
only where `bench/results/` holds a run on that architecture whose correctness checks are green and whose time beats
composed torch. Anything else has to be asked for by name, and a name that cannot be honoured is an error.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

import linlora.kernels as kernels
from linlora.ops import aten

BackendName = Literal["torch", "triton", "cuda"]
OPS = (
    "linearized_lora_linear", "lora_linear", "factor_gradients",
    "linear", "attention", "layer_norm", "rms_norm", "activation", "gated_activation",
)  # fmt: skip

_MODULES: dict[str, ModuleType] = {"torch": aten, "triton": kernels}
_requested: str | None = None  # a module global, not a ContextVar: torch.compile guards on it


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run here; the message says why and what to do."""


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Run every linlora op inside the block on one backend.

    Raises ValueError for a name that does not exist and BackendUnavailableError where the backend cannot run at all.
    The backward of an op runs on the backend of its forward.

    >>> import linlora
    >>> with linlora.use_backend("torch"):
    ...     print(linlora.explain(device="cpu").backend)
    torch
    """
    global _requested
    if name not in ("torch", "triton", "cuda"):
        raise ValueError(f"unknown backend {name!r}: choose 'torch', 'triton' or 'cuda'")
    reason = unavailable(name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reason}")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def select(device: torch.device, op: str) -> ModuleType:
    """The module whose `op` runs for tensors on `device`: the one asked for, else the proven one."""
    name = _requested
    if name is None:
        return _MODULES[automatic(device.type, device.index, op)]
    if not torch.compiler.is_compiling():
        reason = unavailable(name, device)
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot run {op} on {device}: {reason}")
    return _MODULES[name]


@torch.compiler.assume_constant_result
def automatic(device_type: str, device_index: int | None, op: str) -> str:
    """The backend that runs when none was asked for: 'triton' where it is proven for `op`, else 'torch'."""
    if device_type != "cuda":
        return "torch"
    return "triton" if proven("triton", op, architecture(device_type, device_index)) else "torch"


@dataclass(frozen=True)
class Explanation:
    """Which backend an op runs on and why not the others; `str()` of it is the readable form."""

    op: str
    device: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device} runs on {self.backend!r}"]
        return "\n".join(lines + [f"  {name:6s}  {reason}" for name, reason in self.reasons.items()])


def explain(op: str = "linearized_lora_linear", device: torch.device | str = "cpu") -> Explanation:
    """Say which backend would run `op` for tensors on `device` now, and why not the others.

    >>> import linlora
    >>> print(linlora.explain("linearized_lora_linear", "cpu").backend)
    torch
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}: choose one of {', '.join(OPS)}")
    device = torch.device(device)
    chosen = _requested or automatic(device.type, device.index, op)
    how = "asked for with use_backend" if _requested else "chosen automatically"
    reasons = {}
    for name in ("cuda", "triton", "torch"):
        obstacle = unavailable(name, device)
        if name == chosen:
            reasons[name] = how
        elif obstacle is not None:
            reasons[name] = f"not available: {obstacle}"
        elif name == "torch":
            reasons[name] = "available; the chosen backend is faster by the runs in bench/results/"
        else:
            arch = architecture(device.type, device.index)
            reasons[name] = f"available on request; no green and faster run for {arch} in bench/results/"
    return Explanation(op, str(device), chosen, reasons)


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, with the remedy; None when it can."""
    if name == "cuda":
        return "this build of linlora holds no CUDA kernels; use 'triton' on a GPU or 'torch' anywhere"
    return kernels.availability(device) if name == "triton" else None


@functools.cache
def architecture(device_type: str, device_index: int | None = None) -> str:
    """The name evidence is filed under: 'sm_90' for an H100 or H200, 'cpu' for a CPU."""
    if device_type != "cuda":
        return device_type
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}"


@functools.cache
def proven(name: str, op: str, arch: str) -> bool:
    """Whether a committed run on `arch` was green for `op` on this backend and faster than composed torch."""
    return any(
        run["architecture"] == arch and entry["op"] == op and entry["backend"] == name and entry["correct"]
        and entry["speedup_over_torch"] > 1.0
        for run in _evidence()
        for entry in run["evidence"]
    )  # fmt: skip


@functools.cache
def _evidence() -> list[dict]:
    """Every run under bench/results/ that carries an `evidence` table (`make gpu-check` writes them)."""
    import linlora.bench as bench  # the folder, for its data: nothing of it is imported

    files = sorted((Path(bench.__path__[0]) / "results").glob("*/*.json"))
    return [run for run in (json.loads(file.read_text()) for file in files) if "evidence" in run]
