"""Weights that several modules share: embeddings tied to a head, repeated layers, one layer under two names.

What is merged into such a weight changes all of them, and an adapter changes one. So every merge asks here first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from linlora.layers.peft_names import base_name


def shared_names(model: nn.Module) -> list[list[str]]:
    """The names of parameters and buffers that lie in the same memory, in groups; those that share none are left out.

    >>> model = nn.ModuleDict({"embedding": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    >>> model["head"].weight = model["embedding"].weight
    >>> shared_names(model)
    [['embedding.weight', 'head.weight']]
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    places = sorted((*_place(tensor), name) for name, tensor in tensors if tensor.numel())
    groups: list[list[str]] = []
    space, end = "", 0
    for of, start, stop, name in places:
        if of == space and start < end:
            groups[-1].append(name)
            end = max(end, stop)
        else:
            groups.append([name])
            space, end = of, stop
    return [sorted(group) for group in groups if len(group) > 1]


def refuse_shared(model: nn.Module, layers: Iterable[str], action: str, remedy: str) -> None:
    """Raise a ValueError where the weight of one of some LoRA layers, named as in the base model, is shared.

    What PEFT keeps beside a trained module (`original_module`) is gone after a merge, and does not count.
    """
    wanted = set(layers)
    for group in shared_names(model):
        owners = dict(_owner(model, name) for name in group if ".original_module." not in name)
        layer = next((owner for owner in owners.values() if owner in wanted), None)
        if layer is not None and len(owners) > 1:
            other = next(owner for owner in owners.values() if owner != layer)
            raise ValueError(
                f"{action}: layer '{layer}' shares its weight with '{other}' (tied, or one layer used twice), which "
                f"merging would change too; the model is unchanged. {remedy}"
            )


def adapted_layers(model: nn.Module, adapters: Iterable[str]) -> list[str]:
    """The layers that some adapters are of, by their names in the base model."""
    names = set(adapters)
    return [base_name(name) for name, m in model.named_modules() if isinstance(m, LoraLayer) and names & m.r.keys()]


def group_of(name: str, groups: Sequence[Sequence[str]]) -> set[str]:
    """The names that share a weight with one, itself among them."""
    return {name}.union(*(group for group in groups if name in group))


def _owner(model: nn.Module, name: str) -> tuple[int, str]:
    """The identity and the name in the base model of the layer that a parameter is of, the LoRA layer around a base."""
    path = name.rpartition(".")[0].removesuffix(".base_layer")
    return id(model.get_submodule(path)), base_name(path)


def _place(tensor: Tensor) -> tuple[str, int, int]:
    """A space of addresses, and the first and the one past the last that a tensor takes in it."""
    try:
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # of a kind without memory of its own
        start = 0
    if not start:  # the meta device
        return "object", id(tensor), id(tensor) + 1
    last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), start, start + (last + 1) * tensor.element_size()
