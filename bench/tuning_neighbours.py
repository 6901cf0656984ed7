"""The configurations that tuning times for a call: the row of the table, and its neighbours."""

from __future__ import annotations

from dataclasses import replace

import torch
from linlora.kernels.configs import Config, select, select_by_size, split
from linlora.kernels.device import device_traits
from linlora.kernels.neighbours import neighbours

from linlora.ops.backends import LAYER_OPS
from linlora.ops.evidence import Call
from linlora.ops.neighbours import OPS

from .providers import PROVIDERS, Provider

TRITON = PROVIDERS["linlora-triton"]


def configurations(call: Call, device: torch.device) -> dict[str, Config]:
    """What the forward of a call is launched with, by the name of the backend: "triton" and its neighbours. Empty for
    ops that have none."""
    if call.op not in OPS:
        return {}
    itemsize, (rows, inputs, outputs) = getattr(torch, str(call.dtype)).itemsize, call.size
    architecture, multiprocessors = device_traits(device)
    if call.op == "attention":
        row = select_by_size("attention", size=inputs, itemsize=itemsize, architecture=architecture)
    else:
        rank = call.rank if call.op in LAYER_OPS else 0
        row = select(
            call.op, m=rows, n=outputs, rank=rank, itemsize=itemsize, dropout=call.dropout,
            architecture=architecture, multiprocessors=multiprocessors,
            descriptors=inputs * itemsize % 16 == outputs * itemsize % 16 == 0,
        )  # fmt: skip
    near = {"": row} | neighbours(row, itemsize, architecture)
    if call.op in LAYER_OPS:
        of = {"m": rows, "n": outputs, "k": inputs, "itemsize": itemsize, "multiprocessors": multiprocessors}
        near = {change: split(config, **of) for change, config in near.items()}
    return {f"triton {change}".strip(): config for change, config in near.items()}


def provider_of(name: str) -> Provider:
    """The provider of a neighbour."""
    return replace(TRITON, name=f"linlora-{name}", label=f"linlora {name}", backend=name)
