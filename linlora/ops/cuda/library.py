"""The CUDA kernels as PyTorch operators: linlora_cuda.so, which csrc/build.py puts beside this file.

The operators check, allocate and launch in C++ (csrc/register.cpp); torch.compile sees each as one opaque call.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linlora.kernels import fakes
from linlora.kernels.counters import counters
from linlora.ops.cuda import checkout

FOLDER = Path(__file__).parent
_LIBRARY, _STATUS = FOLDER / "linlora_cuda.so", FOLDER / "build.json"
REMEDY = "`make cuda` in a checkout builds them in place, LINLORA_BUILD_CUDA=1 insists when installing"


@functools.cache
def status() -> dict[str, Any]:
    """What csrc/build.py noted: `built`, else the `reason`; `architectures`, `nvcc`, `bytes`, `sources`."""
    if not _STATUS.exists():
        return {"built": False, "reason": "csrc/ has not been built"}
    return json.loads(_STATUS.read_text())


@functools.cache
def obstacle() -> str | None:
    """Why there are no operators, with the remedy; None once the library is loaded."""
    if not status()["built"]:
        return f"this build of linlora holds no CUDA kernels ({status()['reason']}); {REMEDY}"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"{_LIBRARY} cannot be loaded ({error}); build it again: {REMEDY}"
    for fake in (fakes.linearized_lora_linear, fakes.lora_linear):
        torch.library.register_fake(f"linlora_cuda::{fake.__name__}", _without_extras(fake))
    return None


def stale() -> bool:
    """Whether the library was built of other sources than those of this checkout."""
    builder = checkout.script("build.py")
    return builder is not None and status()["built"] and builder.source_hash() != status()["sources"]


def linearized_lora_linear(x: Tensor, *arguments: Any, kernel: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(y, u, c) of the operator."""
    return torch.ops.linlora_cuda.linearized_lora_linear(x, *arguments, counters=_counters(x), kernel=kernel)


def lora_linear(x: Tensor, *arguments: Any, kernel: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, y_tangent, u, c) of the operator."""
    return torch.ops.linlora_cuda.lora_linear(x, *arguments, counters=_counters(x), kernel=kernel)


def _counters(x: Tensor) -> Tensor | None:
    """Zeros that launches on the current stream hand on to each other; in compiled code every launch makes its own."""
    return None if torch.compiler.is_compiling() else counters(x.device, 1 + x.shape[0])


def _without_extras(fake: Any) -> Any:
    """The fake function of an operator that also takes counters and a kernel."""
    return functools.wraps(fake)(lambda *arguments, counters=None, kernel=0, **options: fake(*arguments, **options))
