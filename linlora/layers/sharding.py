"""Parameters whose values lie elsewhere: sharded by FSDP2 (DTensors), offloaded or not loaded yet (the meta device).

A gather is a collective: every process of the mesh has to take part, whoever writes the file in the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The full value of a parameter: gathered from all processes if it is sharded, the tensor itself if not."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """The part of a value, known to every process, that goes into this process's shard of a parameter."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (or tensor parallelism) has sharded a parameter of the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_there(what: str, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise a ValueError where a parameter is on the meta device: it has a shape, and no values yet or elsewhere."""
    for name, parameter in parameters:
        if parameter.is_meta:
            raise ValueError(
                f"{what}: {name} is on the meta device, without values. Load the weights first; of a model offloaded "
                "by accelerate, put them back: accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )


def writes(model: nn.Module) -> bool:
    """Whether this process writes a model's files: of a sharded model, whose parts all processes gather, rank 0 alone.

    Processes that hold whole models, as under DDP, are told apart by who calls.
    """
    mesh: Any = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    return mesh is None or not any(mesh.get_coordinate())
