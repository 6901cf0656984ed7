"""Describes the machine and the versions that make a result."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("linlora", "torch", "triton", "peft", "transformers", "datasets", "accelerate", "numpy", "scikit-learn")
_ROOT = Path(__file__).parents[2]


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Date, commit, machine and versions, as plain JSON values.

    `load` is the number of busy processes. `gpu`, `driver` and `cuda` are there on a GPU only. A caller adds its own
    facts: `environment(device) | {"backend": explain(op, device).backend}`.

    >>> environment()["device"]
    'cpu'
    """
    device = torch.device(device)
    described: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        **versions(),
        "platform": platform.platform(),
        "device": str(device),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        described |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
            "cuda": torch.version.cuda,
        }
    return described


def commit() -> str:
    """The commit of linlora's checkout, "-dirty" when it has changes; $LINLORA_COMMIT where there is no checkout."""
    if given := os.environ.get("LINLORA_COMMIT"):
        return given
    if not (_ROOT / ".git").exists():
        return "unknown"  # installed: a repository around it is not linlora's
    git = ("git", "-C", str(_ROOT))
    found = _output(*git, "rev-parse", "HEAD")
    if not found:
        return "unknown"
    return f"{found}-dirty" if _output(*git, "status", "--porcelain", "--untracked-files=no") else found


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The installed version of each package."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "unknown"


def _output(*command: str) -> str:
    """The output of a command; empty where there is no such command, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
