"""Mappings of tensors that are made when they are asked for; shapes without values, memory, finiteness."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class StoredTensors(Mapping[str, Tensor]):
    """A mapping whose tensors are read, or computed, each time they are asked for.

    Args:
        like: a tensor of the shape and dtype of each, on the meta device.
        read: returns the tensor of a name.

    >>> stored = StoredTensors({"w": torch.empty(2, device="meta")}, lambda name: torch.ones(2))
    >>> stored["w"].tolist(), list(stored)
    ([1.0, 1.0], ['w'])
    """

    def __init__(self, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.like = dict(like)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.like:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    def __contains__(self, name: object) -> bool:  # Mapping's would read the tensor
        return name in self.like


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same names, shapes and dtypes on the meta device; nothing is read.

    >>> shapes({"w": torch.ones(2, 3)})["w"].device.type
    'meta'
    """
    if isinstance(tensors, StoredTensors):
        return tensors.like
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> StoredTensors:
    """Some tensors of a mapping under other names; nothing is read.

    Args:
        names: for each new name the one in the mapping.

    >>> renamed({"encoder.w": torch.ones(2)}, {"w": "encoder.w"})["w"].tolist()
    [1.0, 1.0]
    """
    like = shapes(tensors)
    return StoredTensors({new: like[name] for new, name in names.items()}, lambda new: tensors[names[new]])


def joined(*parts: Mapping[str, Tensor]) -> StoredTensors:
    """The tensors of several mappings in one; nothing is read. Of two by one name the last counts."""
    home = {name: part for part in parts for name in part}
    like = {name: tensor for part in parts for name, tensor in shapes(part).items()}
    return StoredTensors(like, lambda name: home[name][name])


def holding(*dtypes: torch.dtype) -> torch.dtype:
    """A floating-point dtype that holds all values of others exactly; that of all, if they have one.

    >>> holding(torch.float8_e5m2, torch.bfloat16), holding(torch.bfloat16, torch.bfloat16)
    (torch.float32, torch.bfloat16)
    """
    if len(set(dtypes)) == 1:
        return dtypes[0]
    promoted = (torch.float16 if dtype.itemsize == 1 else dtype for dtype in dtypes)  # PyTorch promotes no float8
    return functools.reduce(torch.promote_types, promoted)


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or wider where one of some dtypes is."""
    return holding(torch.float32, *dtypes)


def finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; extremes tell, many times faster than a test of every value.

    >>> finite(torch.tensor([1.0, float("nan")])), finite(torch.ones(0))
    (False, True)
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # no float8 reductions
        tensor = tensor.float()
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor.detach()))


def memory(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
