"""Where and with what a run was made. `python -m linlora.bench.environment` prints the name of the GPU's results."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch


def environment(device: torch.device) -> dict[str, object]:
    """Date, commit, machine and versions; `load` is the number of busy processes before the run began."""
    described: dict[str, object] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("linlora", "torch", "triton", "peft", "transformers", "numpy")},
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
    """The commit of the checkout, "-dirty" when it has changes; $LINLORA_COMMIT where there is no checkout."""
    if given := os.environ.get("LINLORA_COMMIT"):
        return given
    git = ("git", "-C", str(Path(__file__).parent))
    found = _output(*git, "rev-parse", "HEAD")
    if not found:
        return "unknown"
    return f"{found}-dirty" if _output(*git, "status", "--porcelain", "--untracked-files=no") else found


def slug(device_name: str) -> str:
    """The folder of a device under results/: 'h200' for 'NVIDIA H200'.

    >>> slug("NVIDIA H100 80GB HBM3")
    'h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().replace("nvidia", "")).strip("-")


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
        return platform.processor() or "unknown"


def _output(*command: str) -> str:
    """What a command prints; nothing when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    print(slug(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu")
