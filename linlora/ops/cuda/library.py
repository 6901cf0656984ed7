"""The CUDA kernels as a PyTorch operator: linlora_cuda.so, which csrc/build.py puts beside this file, or the
distribution linlora-cuda brings.

The operator checks, allocates and launches in C++ (csrc/register.cpp); torch.compile sees one opaque call.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linlora.kernels.counters import counters
from linlora.kernels.packing import fake, pack, restored
from linlora.kernels.problem import LoraLinear, Result


def _folder() -> Path:
    """Beside this file, where `make cuda` builds, else that of the distribution linlora-cuda."""
    installed, here = importlib.util.find_spec("linlora_cuda"), Path(__file__).parent
    if (here / "linlora_cuda.so").exists() or installed is None or installed.origin is None:
        return here
    return Path(installed.origin).parent


_LIBRARY, _STATUS = _folder() / "linlora_cuda.so", _folder() / "build.json"
_BUILDER = Path(__file__).parents[3] / "csrc" / "build.py"
REMEDY = "`make cuda` in a checkout builds them in place, `pip install --no-build-isolation ./csrc` installs them"


@functools.cache
def status() -> dict[str, Any]:
    """What csrc/build.py noted: `built`, else the `reason`; `architectures`, `nvcc`, `bytes`, hash of `sources`."""
    if not _STATUS.exists():
        return {"built": False, "reason": "csrc/ has not been built"}
    return json.loads(_STATUS.read_text())


@functools.cache
def load() -> str | None:
    """Load the operator. Why there is none, with the remedy; None once it is there."""
    if not status()["built"]:
        return f"this installation of linlora has no CUDA kernels ({status()['reason']}); {REMEDY}"
    if stale():
        return f"{_LIBRARY} is built of other sources than csrc/ holds; {REMEDY}"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"{_LIBRARY} cannot be loaded ({error}); build it again: {REMEDY}"
    torch.library.register_fake("linlora_cuda::lora_linear", _fake)
    runtime, driver = versions()
    if 0 < driver // 1000 < runtime // 1000:
        older = f"CUDA {driver // 1000}"
        return (
            f"{_LIBRARY} holds the runtime of CUDA {runtime // 1000}, and the driver serves {older}: "
            f"update the driver, or build with nvcc of {older}; {REMEDY}"
        )
    return None


def versions() -> tuple[int, int]:
    """The CUDA runtime in the library and the newest that the driver serves: 1000 major + 10 minor, 0 without one."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(_LIBRARY)).linlora_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    return runtime.value, driver.value


def obstacle(device: torch.device) -> str | None:
    """Why the operator takes no tensors of a device, with the remedy; None when it does."""
    if device.type == "cuda":
        return load()
    return None if _registered(device) else load() or f"the kernels need tensors on a CUDA GPU, got {device}"


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
    """Whether the operator has a kernel for such tensors, of no GPU: one that somebody else gave."""
    operator = getattr(torch.ops.linlora_cuda, "lora_linear", None)
    key = torch._C._dispatch_key_for_device(device.type)
    return operator is not None and torch._C._dispatch_has_kernel_for_dispatch_key("linlora_cuda::lora_linear", key)


def _fake(*arguments: Any, counters: Tensor | None = None, kernel: int = 0) -> list[Tensor]:
    return fake(LoraLinear, {"save": True, "primal": True})(*arguments)
