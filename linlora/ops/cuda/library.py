"""The CUDA kernels as a PyTorch operator: linlora_cuda.so, which csrc/build.py puts beside this file.

The operator checks, allocates and launches in C++ (csrc/register.cpp); torch.compile sees one opaque call.
"""

from __future__ import annotations

import functools
import json
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linlora.kernels.counters import counters
from linlora.kernels.packing import fake, pack, restored
from linlora.kernels.problem import LoraLinear, Result

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
    """Load the operator. Why there is none, with the remedy; None once it is there."""
    if not status()["built"]:
        return f"this build of linlora holds no CUDA kernels ({status()['reason']}); {REMEDY}"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"{_LIBRARY} cannot be loaded ({error}); build it again: {REMEDY}"
    torch.library.register_fake("linlora_cuda::lora_linear", _fake)
    return None


def obstacle(device: torch.device) -> str | None:
    """Why the operator takes no tensors of a device, with the remedy; None when it does."""
    if _registered(device):
        return None
    reason = load()
    return reason if reason or _registered(device) else f"the kernels need tensors on a CUDA GPU, got {device}"


def stale() -> bool:
    """Whether the library was built of other sources than those of this checkout."""
    if not _BUILDER.exists() or not status()["built"]:
        return False
    return runpy.run_path(str(_BUILDER))["source_hash"]() != status()["sources"]


def lora_linear(problem: LoraLinear, save: bool = True, primal: bool = True, kernel: int = 0) -> Result:
    """The result of the operator."""
    x, (tensors, numbers) = problem.x, pack(problem)
    # Zeros that launches on a stream hand on to each other; in compiled code every launch makes its own.
    zeros = None if torch.compiler.is_compiling() else counters(x.device, 1 + x.shape[0])
    found = torch.ops.linlora_cuda.lora_linear(tensors, *numbers, save, primal, counters=zeros, kernel=kernel)
    return restored(problem.outputs(save, primal), found)


def _registered(device: torch.device) -> bool:
    """Whether the operator is there and has a kernel for such tensors: a GPU's, or one that somebody else gave."""
    operator = getattr(torch.ops.linlora_cuda, "lora_linear", None)
    key = torch._C._dispatch_key_for_device(device.type)
    return operator is not None and torch._C._dispatch_has_kernel_for_dispatch_key("linlora_cuda::lora_linear", key)


def _fake(*arguments: Any, counters: Tensor | None = None, kernel: int = 0) -> list[Tensor]:
    return fake(LoraLinear, {"save": True, "primal": True})(*arguments)
