"""Parameters whose values lie elsewhere: sharded by FSDP2 (DTensors), offloaded, not loaded yet, or computed by a call.

A gather is a collective: every process of the mesh has to take part, whoever writes the file in the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; there is none where their module, a second to import, was not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full value of a parameter: gathered from all processes if it is sharded, the tensor itself if not."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """The part of a value, known to every process, that goes into this process's shard of a parameter."""
    if not _is_shard(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (or tensor parallelism) has sharded a parameter of the model."""
    return any(map(_is_shard, model.parameters()))


def check_weight(where: str, name: str, part: Any, so: str = "", error: type[Exception] = ValueError) -> None:
    """Raise where the weight of a part of a model, by the name it has in a message, is no parameter with values.

    Args:
        so: what would follow if it were used. error: the exception for a weight that is computed on every call.
    """
    if "weight" not in part._parameters:
        raise error(
            f"{where}: the weight of {name} is computed on every call (a parametrization, weight_norm, pruning){so}; "
            "make it a parameter first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
            "prune.remove)"
        )
    check_there(where, [(f"the weight of {name}", part.weight)])


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
    mesh: Any = next((p.device_mesh for p in model.parameters() if _is_shard(p)), None)
    return mesh is None or not any(mesh.get_coordinate())
