"""The CUDA kernels as PyTorch operators: linlora_cuda.so, which csrc/build.py puts beside this file.

The operators check, allocate and launch in C++ (csrc/register.cpp); torch.compile sees each as one opaque call.
"""

from __future__ import annotations

import functools
import json
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linlora.kernels import fakes
from linlora.kernels.counters import counters

FOLDER = Path(__file__).parent
_LIBRARY, _STATUS = FOLDER / "linlora_cuda.so", FOLDER / "build.json"
_BUILDER = FOLDER.parents[2] / "csrc" / "build.py"
REMEDY = "`make cuda` in a checkout builds them in place, LINLORA_BUILD_CUDA=1 insists when installing"


@functools.cache
def status() -> dict[str, Any]:
    """What csrc/build.py noted: `built`, else the `reason`; `architectures`, `nvcc`, `bytes`, `sources`."""
    if not _STATUS.exists():
        return {"built": False, "reason": "csrc/ has not been built"}
    return json.loads(_STATUS.read_text())


@functools.cache
def load() -> str | None:
    """Load the operators. Why there are none, with the remedy; None once they are there."""
    if not status()["built"]:
        return f"this build of linlora holds no CUDA kernels ({status()['reason']}); {REMEDY}"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"{_LIBRARY} cannot be loaded ({error}); build it again: {REMEDY}"
    for fake in (fakes.linearized_lora_linear, fakes.lora_linear):
        torch.library.register_fake(f"linlora_cuda::{fake.__name__}", _without_extras(fake))
    return None


def obstacle(device: torch.device) -> str | None:
    """Why the operators take no tensors of a device, with the remedy; None when they do."""
    if _registered(device):
        return None
    reason = load()
    return reason if reason or _registered(device) else f"the kernels need tensors on a CUDA GPU, got {device}"


def stale() -> bool:
    """Whether the library was built of other sources than those of this checkout."""
    if not _BUILDER.exists() or not status()["built"]:
        return False
    return runpy.run_path(str(_BUILDER))["source_hash"]() != status()["sources"]


def linearized_lora_linear(x: Tensor, *arguments: Any, kernel: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, c) of the operator."""
    return torch.ops.linlora_cuda.linearized_lora_linear(x, *arguments, counters=_counters(x), kernel=kernel)


def lora_linear(x: Tensor, *arguments: Any, kernel: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, y_tangent, u, c) of the operator."""
    return torch.ops.linlora_cuda.lora_linear(x, *arguments, counters=_counters(x), kernel=kernel)


def _registered(device: torch.device) -> bool:
    """Whether the operators are there and have a kernel for such tensors: a GPU's, or one that somebody else gave."""
    operator = getattr(torch.ops.linlora_cuda, "lora_linear", None)
    key = torch._C._dispatch_key_for_device(device.type)
    return operator is not None and torch._C._dispatch_has_kernel_for_dispatch_key("linlora_cuda::lora_linear", key)


def _counters(x: Tensor) -> Tensor | None:
    """Zeros that launches on the current stream hand on to each other; in compiled code every launch makes its own."""
    return None if torch.compiler.is_compiling() else counters(x.device, 1 + x.shape[0])


def _without_extras(fake: Any) -> Any:
    """The fake function of an operator that also takes counters and a kernel."""
    return functools.wraps(fake)(lambda *arguments, counters=None, kernel=0, **options: fake(*arguments, **options))
