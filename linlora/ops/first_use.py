"""A call that nothing is known of: say so once, or measure it there and then in a process of its own.

LINLORA_TUNE=first-use runs `linlora tune` for the call. It is another process, because a kernel that fails can leave a
GPU's context unusable for good; it waits for its turn where several processes, the ranks of a job, meet calls at once.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from linlora.ops import evidence
from linlora.ops.evidence import Call, Entry


def meet(call: Call, index: int | None) -> Entry | None:
    """The entry of a call that has none, if it is measured now. Raises ValueError for another value of LINLORA_TUNE."""
    when = os.environ.get("LINLORA_TUNE", "")
    if when not in ("", "first-use"):
        raise ValueError(f"LINLORA_TUNE={when!r}: 'first-use' measures calls when they are first met; or unset it")
    if not when:
        if not evidence.own_entries(index) and not evidence.of_package(index) and os.environ.get("RANK", "0") == "0":
            _say(evidence.machine(index)["gpu"])
        return None
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made.json"
        asked = ["tune", "--call", json.dumps(call._asdict()), "--export", str(file)]
        ended = subprocess.run(
            [sys.executable, "-m", "linlora.cli", *asked], env=_environment(index), capture_output=True, text=True
        )
        if not file.exists():
            last = (ended.stderr.strip().splitlines() or ["no output"])[-1]
            print(f"linlora: {call} could not be measured, so composed torch runs it: {last}", file=sys.stderr)
            return None
        evidence.add(map(Entry.parse, json.loads(file.read_text())["entries"]), keep=False)
    return evidence.decisive(call, index)


def _environment(index: int | None) -> dict[str, str]:
    """That of a process which sees this one's GPU alone and measures nothing by itself."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LINLORA_TUNE", "LINLORA_VERIFY")}
    place = torch.cuda.current_device() if index is None else index
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[place].strip() if place < len(visible) else ""
    return environment | {"CUDA_VISIBLE_DEVICES": name or str(place)}


@functools.cache
def _say(gpu: str) -> None:
    """Once a process."""
    what = f"no kernel is proven on this {gpu} yet, so composed torch runs"
    print(f"linlora: {what}; `linlora tune` checks and times the kernels", file=sys.stderr)
