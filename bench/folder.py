"""The folder of a device's results. `python -m linlora.bench.folder` prints the name of this machine's."""

from __future__ import annotations

import re

import torch


def slug(device_name: str) -> str:
    """The folder of a device under results/: 'h200' for 'NVIDIA H200'.

    >>> slug("NVIDIA H100 80GB HBM3")
    'h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().replace("nvidia", "")).strip("-")


if __name__ == "__main__":
    print(slug(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu")
